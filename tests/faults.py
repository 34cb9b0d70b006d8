"""Faults that tests plant in attention kernels, and a measure of how far each moves a kernel's output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from vattn import kernels
from vattn.hf import decode_context
from vattn.kernels import AttentionParams, SequenceRanges

Decode = Callable[..., torch.Tensor]
Change = Callable[[Decode, torch.Tensor, torch.Tensor, torch.Tensor, SequenceRanges, AttentionParams], torch.Tensor]


def spans_of(spans: SequenceRanges, starts: torch.Tensor, ends: torch.Tensor) -> SequenceRanges:
    return SequenceRanges(spans.slots, starts, ends, longest=spans.longest, adjacent=spans.adjacent)


def scaled(times: float) -> Change:
    return lambda decode, q, k, v, spans, scores: decode(q, k, v, spans, replace(scores, scale=scores.scale * times))


def short(decode: Decode, q: Any, k: Any, v: Any, spans: SequenceRanges, scores: AttentionParams) -> torch.Tensor:
    ends = torch.where(spans.ends - spans.starts > 1, spans.ends - 1, spans.ends)
    return decode(q, k, v, spans_of(spans, spans.starts, ends), scores)


def rewritten(
    decode: Decode, q: Any, k: Any, v: Any, spans: SequenceRanges, scores: AttentionParams, change: Any
) -> torch.Tensor:
    """Decodes on copies of the rows, where ``change(keys, values)`` replaces the rows of each sequence."""
    parts = [change(k[slot, start:end], v[slot, start:end]) for slot, start, end in spans.tolist()]
    longest = max(len(rows) for rows, _ in parts) + 256  # kernels may load rows before and behind those of a sequence
    copies = [parts[0][i].new_zeros(len(parts), longest, *parts[0][i].shape[1:]) for i in range(2)]
    for row, both in enumerate(parts):
        for copy, rows in zip(copies, both, strict=True):
            copy[row, 127 : 127 + len(rows)] = rows
    told = [(row, 127, 127 + len(rows)) for row, (rows, _) in enumerate(parts)]
    return decode(q, *copies, SequenceRanges.of(told, q.device), scores)


def long(decode: Decode, q: Any, k: Any, v: Any, spans: SequenceRanges, scores: AttentionParams) -> torch.Tensor:
    """Adds a row of zeros behind the rows of each sequence."""

    def change(keys: torch.Tensor, values: torch.Tensor) -> Any:
        return tuple(torch.cat((t, t.new_zeros(1, *t.shape[1:]))) for t in (keys, values))

    return rewritten(decode, q, k, v, spans, scores, change)


def swapped(decode: Decode, q: Any, k: Any, v: Any, spans: SequenceRanges, scores: AttentionParams) -> torch.Tensor:
    """Swaps K and V of the first head."""

    def change(keys: torch.Tensor, values: torch.Tensor) -> Any:
        keys, values = keys.clone(), values.clone()
        keys[:, 0], values[:, 0] = values[:, 0].clone(), keys[:, 0].clone()
        return keys, values

    return rewritten(decode, q, k, v, spans, scores, change)


def stale(decode: Decode, q: Any, k: Any, v: Any, spans: SequenceRanges, scores: AttentionParams) -> torch.Tensor:
    """Makes the last sequence that has more than one row one row too short."""
    ends = spans.ends.clone()
    lengths = (spans.ends - spans.starts).tolist()
    ends[max((row for row, n in enumerate(lengths) if n > 1), default=0)] -= 1
    return decode(q, k, v, spans_of(spans, spans.starts, ends), scores)


def window_short(
    decode: Decode, q: Any, k: Any, v: Any, spans: SequenceRanges, scores: AttentionParams
) -> torch.Tensor:
    """Makes the window one position too short, in layers with a window and for sequences that fill it."""
    if scores.window is None:
        return decode(q, k, v, spans, scores)
    starts = torch.where(spans.ends - spans.starts == scores.window, spans.starts + 1, spans.starts)
    return decode(q, k, v, spans_of(spans, starts, spans.ends), scores)


def window_long(decode: Decode, q: Any, k: Any, v: Any, spans: SequenceRanges, scores: AttentionParams) -> torch.Tensor:
    """Makes the window one position too long, in layers with a window and for sequences that fill it.

    The memory of the row before the window may have been given back, so a copy of the window's first row stands for it.
    """

    def change(keys: torch.Tensor, values: torch.Tensor) -> Any:
        return tuple(torch.cat((t[:1], t)) if len(t) == scores.window else t for t in (keys, values))

    return rewritten(decode, q, k, v, spans, scores, change)


def without(name: str) -> Change:
    return lambda decode, q, k, v, spans, scores: decode(q, k, v, spans, replace(scores, **{name: None}))


FAULTS: dict[str, Change] = {
    "scale x 1.25": scaled(1.25),
    "scale x 2": scaled(2),
    "one short": short,
    "one long": long,
    "window one short": window_short,
    "window one long": window_long,
    "K and V of a head swapped": swapped,
    "a row's length stale": stale,
    "sinks ignored": without("sinks"),
    "soft cap ignored": without("softcap"),
}


# The first query of a prompt sees a single row, and would see none with these two faults.
PROMPT_FAULTS = [fault for fault in FAULTS if fault not in ("one short", "a row's length stale")]


def prompt_fault(prefill: Any, fault: str) -> Any:
    """Returns a kernel's ``prefill`` with a fault."""

    def wrong(
        q: Any, k: Any, v: Any, spans: SequenceRanges, counts: list[int], scores: AttentionParams
    ) -> torch.Tensor:
        def decode(q: Any, k: Any, v: Any, spans: SequenceRanges, scores: AttentionParams) -> torch.Tensor:
            out: torch.Tensor = prefill(q, k, v, spans, counts, scores)
            return out

        if not fault.startswith("window"):
            return FAULTS[fault](decode, q, k, v, spans, scores)
        by = -1 if fault.endswith("short") else 1
        return decode(q, k, v, spans, replace(scores, window=None if scores.window is None else scores.window + by))

    return wrong


def of_probe(q: torch.Tensor) -> bool:
    return bool((q == 1).all())


@contextlib.contextmanager
def decoding(name: str, decode: Callable[[Decode], Decode]) -> Iterator[None]:
    """Within this context, the kernel ``name`` decodes by what ``decode`` returns for the kernel's own function."""
    kernel = kernels.KERNELS[name]
    with mock.patch.object(kernel, "decode", decode(kernel.decode)):
        yield


@contextlib.contextmanager
def planted_in_prompts(name: str, fault: str) -> Iterator[None]:
    """Within this context, a kernel computes prompts with a fault."""
    kernel = kernels.KERNELS[name]
    with mock.patch.object(kernel, "prefill", prompt_fault(kernel.prefill, fault)):
        yield


@contextlib.contextmanager
def planted(name: str, fault: str) -> Iterator[None]:
    """Within this context, a kernel decodes with a fault."""
    if fault == "a scale of fp8 ignored":
        with mock.patch.object(decode_context.DecodeContext, "_scaled", lambda self, states, scale: states):
            yield
        return
    change = FAULTS[fault]
    with decoding(name, lambda own: lambda *args: change(own, *args)):
        yield


class Moves:
    """Measures how far each fault would move the output of a kernel.

    Attributes:
        by: by fault, the largest difference seen, relative to the norm of a head's output.
    """

    def __init__(self) -> None:
        self.by: dict[str, float] = dict.fromkeys(FAULTS, 0.0)

    def recording(self, own: Decode) -> Decode:
        defined = kernels.KERNELS["reference"].__class__().decode

        def decode(q: Any, k: Any, v: Any, spans: SequenceRanges, scores: AttentionParams) -> torch.Tensor:
            if not of_probe(q):
                live = [row for row, (_, start, end) in enumerate(spans.tolist()) if end > start]
                given = q.double(), k, v, spans, scores
                right = defined(*given)[live]
                for fault, change in FAULTS.items():
                    wrong = change(defined, *given)[live]
                    apart = (wrong - right).norm(dim=-1) / right.norm(dim=-1).clamp_min(1e-30)
                    self.by[fault] = max(self.by[fault], float(apart.max()))
            return own(q, k, v, spans, scores)

        return decode
