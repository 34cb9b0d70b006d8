"""Attention kernels on virtual memory: a plane for each layer's K and V (compact), or rows of all layers (interleaved).

One layer of Llama-3-8B's heads in bfloat16; the virtual caches hold 32 layers and one is computed on, in turns with the
same kernel on torch's memory. ``TB/s`` counts the K and V that a decode step reads, ``TFLOP/s`` the products of a
causal prefill. ``prefill_virtual_over_cudamalloc``: the rate of prefills on interleaved rows over that on torch's
memory, of the kernel that is fastest there, the lower of all works. ``prefill_contiguous_over_paged``: over that on
shuffled pages, of a kernel that takes them, likewise. Without a GPU small ones run, to try the script.
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
        if rows and row["work"] != rows[-1]["work"]:  # as far as it is
            report.write("kernels", options.device, rows, bars_of(rows), options.out)
        rows.append(row)
        print(row, flush=True)
    report.write("kernels", options.device, rows, bars_of(rows), options.out)


if __name__ == "__main__":
    main()
