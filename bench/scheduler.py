"""How fast the engine's scheduler is, on a simulated cache: some 40 requests run at a time, nothing is computed.

``scheduler_us``: microseconds that an iteration takes the scheduler and the simulation together;
``scheduler_running_mean``: requests that ran on average; ``scheduler_iterations``: iterations that were simulated.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Any

import report

sys.path.insert(0, str(report.ROOT / "tests"))

from simulation import Simulation


class Unchecked(Simulation):
    """A simulation whose invariants are not recounted after every iteration."""

    def check(self) -> None:
        for request in self.scheduler.requests.ended:
            self.done[request.id] = request
        self.scheduler.requests.ended.clear()


def simulated(iterations: int) -> dict[str, Any]:
    """What some iterations took, with prompts of 50 to 500 tokens and outputs of 100 to 400."""
    simulation = Unchecked(200_000, endless=True, max_num_seqs=48, max_num_batched_tokens=2048)
    chance, number, running = random.Random(1), 0, 0
    start = time.perf_counter()
    for _ in range(iterations):
        while len(list(simulation.scheduler.requests)) < 42:
            simulation.add(str(number), chance.randrange(50, 500), chance.randrange(100, 400))
            number += 1
        simulation.step()
        running += len(simulation.scheduler.requests.running)
    seconds = time.perf_counter() - start
    return {"iterations": iterations, "requests": number, "running mean": running / iterations, "seconds": seconds}


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=180_000)
    options = parser.parse_args()
    row = simulated(options.iterations)
    bars = {
        "scheduler_us": 1e6 * row["seconds"] / row["iterations"],
        "scheduler_running_mean": row["running mean"],
        "scheduler_iterations": row["iterations"],
    }
    report.write("scheduler", "cpu", [row], bars, options.out)


if __name__ == "__main__":
    main()
