"""The map of a cache's slots as text."""

from __future__ import annotations

from vattn import _core


def drawn(slots: list[_core.SlotInfo], granularity: int) -> str:
    """Returns a line for each slot with a sequence or memory, and one for each of its runs.

    Args:
        slots: the map that ``KVCache.map`` returns.
        granularity: bytes of a granule; extents are shown in granules, joined by ``+``.
    """
    lines = []
    for index, slot in enumerate(slots):
        mapped = sum(run["tail"] - run["head"] for run in slot["runs"])
        if slot["state"] == "bare":
            continue
        head = f"slot {index} {slot['state']} length {slot['length']} mapped {mapped / 2**20:.3f} MiB"
        runs = [
            f"  plane {plane} @{run['offset']:#014x}: " + "+".join(str(n // granularity) for n in run["extents"])
            for plane, run in enumerate(slot["runs"])
            if run["extents"]
        ]
        lines += [head, *runs]
    return "\n".join(lines)
