"""Which tests ``make test`` leaves out, and ``make test-all`` runs."""

from __future__ import annotations

from typing import Any

import pytest


def unusual(items: list[pytest.Item]) -> set[pytest.Item]:
    """What ``--usual`` leaves out: all but some of the parameters of a test marked thorough, on each kind of device."""
    alike: dict[Any, list[Any]] = {}
    for item in items:
        if item.get_closest_marker("thorough"):
            place = item.nodeid.partition("[")[0], bool(item.get_closest_marker("gpu"))
            alike.setdefault(place, []).append(item)
    left_out: set[pytest.Item] = set()
    for mine in alike.values():
        keeps = (mine[0].get_closest_marker("thorough").args or (0,))[0]
        left_out |= set(mine) - set(_various(mine, keeps))
    return left_out


def _various(items: list[Any], count: int) -> list[Any]:
    """Some tests, in turns the one whose parameters have most values that were not among those before."""
    left, found, seen = list(items), [], set()
    while left and len(found) < count:
        values = [{(name, repr(value)) for name, value in item.callspec.params.items()} for item in left]
        best = max(range(len(left)), key=lambda at: len(values[at] - seen))
        found.append(left.pop(best))
        seen |= values[best]
    return found
