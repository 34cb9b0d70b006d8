"""What odd and hostile input does: a peer's messages, models' configurations, allocations that fail; calls on a hit.

``protocol_inputs``: messages of a peer, each of which was refused or went through, without anything else happening;
``plan_configs_right``: of the configurations of the installed transformers, in each form, those whose layers are what
``DynamicCache`` makes of them or that are refused for what vattn has no rows for; ``calls_expected_on_hit``: calls of
the driver for a sequence that begins behind 500 known tokens and was told of 2000, beside a parked one of that length;
``allocations_failed``: allocations of a scenario in the core, each of which failed once and lost nothing.
"""

from __future__ import annotations

import collections
import re
import sys
from pathlib import Path
from typing import Any

import report

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import configurations  # noqa: E402
import protocol  # noqa: E402

from vattn import KVCache, KVLayout  # noqa: E402

MEMORY_CALLS = ("create", "map", "set_access", "unmap", "release")


def plans() -> tuple[list[dict[str, Any]], float]:
    """How many configurations were read and refused, by form, and the part of them that is right."""
    found = list(configurations.answers("object", "file", "old file"))
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for answer in found:
        counts[answer.form, "refused" if answer.got is None else "read"] += 1
    rows = [{"what": f"{form}: {outcome}", "count": count} for (form, outcome), count in sorted(counts.items())]
    return rows, sum(answer.right for answer in found) / len(found)


def calls_on_a_hit() -> int:
    """Calls of the driver from opening the sequence to its last position."""
    layout = KVLayout.uniform(layers=32, kv_heads=8, head_dim=128, max_len=8192)
    with KVCache(layout, slots=8, mapper=False) as cache:
        known, other = cache.open(), cache.open()
        known.grow(500)
        known.remember(range(500))
        other.grow(2000)
        other.close()
        before = cache.stats().driver_calls
        sequence = cache.open(tokens=[*range(500), 7], expected=2000)
        assert sequence.length == 500
        while sequence.length < 2000:
            sequence.grow(1)
        after = cache.stats().driver_calls
        return sum(after[call] - before[call] for call in MEMORY_CALLS)


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="messages of a peer (default 10000)")
    options = parser.parse_args()
    outcomes = protocol.run(options.inputs, seed=1)
    rows = [{"what": f"protocol: {outcome}", "count": count} for outcome, count in outcomes.items()]
    configs, right = plans()
    bars = {
        "protocol_inputs": sum(outcomes.values()),
        "plan_configs_right": right,
        "calls_expected_on_hit": calls_on_a_hit(),
        "allocations_failed": sum(map(int, re.findall(r"each of (\d+) failed once", report.native("allocations")))),
    }
    report.write("robustness", options.device, [*rows, *configs], bars, options.out)


if __name__ == "__main__":
    main()
