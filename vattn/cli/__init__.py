"""The command ``vattn``: the only place that reads the environment."""

from vattn.cli.command import main

__all__ = ["main"]
