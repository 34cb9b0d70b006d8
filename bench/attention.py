"""Attention kernels on three kinds of memory: torch's own, virtual with a plane for each layer's K and V, virtual rows.

One layer of Llama-3-8B's heads in bfloat16; the virtual caches hold 32 layers and one is computed on. ``TB/s`` counts
the K and V that a decode step reads, ``TFLOP/s`` the products of a causal prefill. ``prefill_virtual_over_cudamalloc``:
the rate of prefills on virtual rows over that on torch's memory, of the kernel that is fastest there, the lower of all
works; ``prefill_contiguous_over_paged``: the same over FlashAttention-3 on shuffled pages of 64 rows.
Without a GPU small ones run, to try the script.
"""

from __future__ import annotations

from typing import Any

import report

from vattn import speed


def main() -> None:
    options = report.options(__doc__.splitlines()[0]).parse_args()
    rows: list[dict[str, Any]] = []
    for row in speed.kernel_speed(options.device, 1 if options.device.startswith("cuda") else 64):
        rows.append(row)
        print(row, flush=True)
    rates = {(r["work"], r["kernel"], r["memory"]): r["TFLOP/s"] for r in rows if "TFLOP/s" in r}
    bars: dict[str, float] = {}
    for work in dict.fromkeys(work for work, _, _ in rates):
        there = {kernel: rate for (w, kernel, kind), rate in rates.items() if (w, kind) == (work, speed.MEMORIES[0])}
        best = max(there, key=there.__getitem__)
        virtual = rates[work, best, "virtual, interleaved"]
        found = {"prefill_virtual_over_cudamalloc": virtual / there[best]}
        if paged := rates.get((work, "fa3", f"pages of {speed.PAGE}")):
            found["prefill_contiguous_over_paged"] = rates[work, "fa3", "virtual, interleaved"] / paged
        bars |= {name: min(ratio, bars.get(name, ratio)) for name, ratio in found.items()}
    report.write("kernels", options.device, rows, bars, options.out)


if __name__ == "__main__":
    main()
