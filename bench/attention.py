"""The speed of attention kernels on virtual memory, in the compact and the interleaved layout, and on torch's memory.

The attention is that of one layer of Llama-3-8B in bfloat16. The virtual caches hold 32 layers, one of which is used:
the compact layout has a plane for each layer's K and each layer's V, the interleaved layout has rows of all layers.
Each kernel runs in turns on virtual memory and on memory that torch allocates. ``TB/s`` counts the K and V that a
decode step reads, ``TFLOP/s`` the products of a causal prefill.

``prefill_virtual_over_cudamalloc``: the rate of a prefill on interleaved rows over its rate on torch's memory, for the
kernel that is fastest on torch's memory; the lowest ratio of all workloads.
``prefill_contiguous_over_paged``: the rate of a prefill on interleaved rows over its rate on shuffled pages, for
kernels that take pages; the lowest ratio.
Without a GPU, smaller sequences are computed, to test the script.
"""

from __future__ import annotations

from typing import Any

import report

from vattn.bench import decode


def bars_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    prefills: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row.get("unit") == "TFLOP/s" and row["memory"] == "interleaved":
            prefills.setdefault(row["work"], []).append(row)
    best = [max(of_work, key=lambda row: float(row["torch's"])) for of_work in prefills.values()]
    bars = {"prefill_virtual_over_cudamalloc": min(row["virtual / torch's"] for row in best)}
    if paged := [row["virtual / paged"] for of_work in prefills.values() for row in of_work if "paged" in row]:
        bars["prefill_contiguous_over_paged"] = min(paged)
    return bars


def main() -> None:
    options = report.options(__doc__.splitlines()[0]).parse_args()
    rows: list[dict[str, Any]] = []
    for row in decode.kernel_speed(options.device, 1 if options.device.startswith("cuda") else 64):
        if rows and row["work"] != rows[-1]["work"]:  # what has been measured so far
            report.write("kernels", options.device, rows, bars_of(rows), options.out)
        rows.append(row)
        print(row, flush=True)
    report.write("kernels", options.device, rows, bars_of(rows), options.out)


if __name__ == "__main__":
    main()
