"""The command ``vattn``: the only part of the package that reads environment variables."""

from vattn.cli.command import main

__all__ = ["main"]
