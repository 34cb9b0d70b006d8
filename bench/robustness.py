"""The effect of malformed messages, of all models' configurations and of failing allocations; calls on a prefix hit.

``protocol_inputs``: how many inputs a peer has sent in place of the protocol's messages. Each of them was refused or
accepted, and nothing else happened.
``plan_configs_right``: the part of the configurations of the installed transformers, in each form, whose layers are
those that ``DynamicCache`` makes, or that are refused because vattn has no rows for their layers.
``calls_expected_on_hit``: driver calls for a sequence that is opened behind a cached prefix of 500 tokens with
``expected=2000``, while there is a parked slot of that length, until the sequence has 2000 tokens.
``allocations_failed``: how many allocations of a scenario in the core failed, each once, without anything being lost.
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
from vattn.bench.replay import MEMORY_CALLS  # noqa: E402


def plans() -> tuple[list[dict[str, Any]], float]:
    """How many configurations of each form were read and refused, and the part of all for which that was right."""
    found = list(configurations.answers("object", "file", "old file"))
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for answer in found:
        counts[answer.form, "refused" if answer.got is None else "read"] += 1
    rows = [{"what": f"{form}: {outcome}", "count": count} for (form, outcome), count in sorted(counts.items())]
    return rows, sum(answer.right for answer in found) / len(found)


def calls_on_a_hit() -> int:
    """How many driver calls are made from opening the sequence until it has grown to its last position."""
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
