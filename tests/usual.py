"""Which tests ``make test`` leaves out, and ``make test-all`` runs."""

from __future__ import annotations

from typing import Any

import pytest


def unusual(items: list[pytest.Item]) -> set[pytest.Item]:
    """What ``--usual`` leaves out: all but some of the parameters of a test marked thorough, on each kind of device."""
    alike: dict[Any, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("thorough"):
            place = item.nodeid.partition("[")[0], bool(item.get_closest_marker("gpu"))
            alike.setdefault(place, []).append(item)
    left_out: set[pytest.Item] = set()
    for mine in alike.values():
        keeps = (mine[0].get_closest_marker("thorough").args or (0,))[0]  # spread over the parameters
        kept = {mine[at * len(mine) // keeps] for at in range(keeps)}
        left_out |= set(mine) - kept
    return left_out
