"""``Prompt``: a call of a Hugging Face model with several tokens for each row, whose attention is a stock kernel's."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from vattn import kernels
from vattn.kernels import AttentionParams, AttentionSpec, Kernel, SequenceRanges, alike
from vattn.models.attention import UnsupportedError, attending

if TYPE_CHECKING:
    from vattn.hf.watch import PromptWatch

# Faster than what transformers calls for such queries, see docs/benchmarks.md, and there without compiling.
_FASTER = {"first": ("fa3",), "padded": ("fa3", "fa2"), "chunk": ("fa3", "fa2")}


class Prompt:
    """The rows of a batch that go on behind what a cache holds of them.

    Args:
        hidden: positions of each row that its attention mask hides on the left.
        start: positions that the cache holds, padding included.
        n: tokens of each row, padding included.
        windows: of the layers.
        attention: the name of the kernel, or ``"auto"`` for one that is faster than transformers' own.
    """

    store = None  # updates of the cache are as ever
    own_attention = False
    watch: PromptWatch | None = None  # of a prompt that is verified

    def __init__(self, hidden: list[int], start: int, n: int, windows: list[int | None], attention: str) -> None:
        self.hidden, self.start, self.n = hidden, start, n
        self._end = start + n
        self._counts = [min(n, self._end - pad) for pad in hidden]
        self._queries = "chunk" if start else "first"
        self.kind = "padded" if any(hidden) and not start else self._queries
        self.slower = False  # whether no kernel does it, or is faster than transformers' own
        self._windows = windows
        self._attention = attention
        self._spans: dict[Any, SequenceRanges] = {}
        self._places: dict[torch.device, torch.Tensor] = {}

    @property
    def binding_windows(self) -> frozenset[int]:
        """Those that hide something from the last query."""
        return frozenset(window for window in self._windows if window is not None and window < self._end)

    def run(self, configs: list[Any]) -> contextlib.AbstractContextManager[None]:
        """While it lasts the model with these configurations computes this prompt."""
        return attending(self, configs)

    def attend(
        self, at: int | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: AttentionParams
    ) -> torch.Tensor:
        """Of the module at a layer, on all that the cache has returned: ``[batch, heads, tokens, dim]`` each.

        Returns ``[batch, tokens, heads, dim]``, zeros where a query is padding.
        """
        if at is None or q.shape[2] != self.n or k.shape[2] > self._end:
            raise UnsupportedError("its attention is of other rows than it is given")
        batch, heads, n, _ = q.shape
        windows = [window for window in (self._windows[at], how.window) if window is not None]
        how = AttentionParams(scale=how.scale, softcap=how.softcap, sinks=how.sinks, window=min(windows, default=None))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if not alike(k, v):  # as the model made them
            k, v = k.contiguous(), v.contiguous()
        kernel, spans = self._kernel(q, k, v, how), self._spans_of(k)
        packed = q.reshape(batch * n, heads, -1)
        if not any(self.hidden):
            out = kernel.prefill(packed, k, v, spans, self._counts, how)
        else:
            places = self._places_on(q.device)
            seen = kernel.prefill(packed[places], k, v, spans, self._counts, how)
            out = seen.new_zeros(batch * n, *seen.shape[1:]).index_copy_(0, places, seen)
        out = out.view(batch, n, *out.shape[1:])
        if self.watch is not None:
            self.watch.attended(at, kernel, q, k, v, out, how)
        return out

    def _kernel(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: AttentionParams) -> Kernel:
        options: dict[str, Any] = {"softcap": how.softcap is not None, "sinks": how.sinks is not None}
        task = AttentionSpec.of(q, k, v, queries=self._queries, window=how.window is not None, **options)
        names = _FASTER[self.kind] if self._attention == "auto" else (self._attention,)
        for name in names:
            with contextlib.suppress(ValueError):
                return kernels.choose(task, name=name)
        self.slower = True
        raise UnsupportedError("no kernel is faster than transformers' own")

    def _spans_of(self, k: torch.Tensor) -> SequenceRanges:
        """Of rows of which a window may have left out the first."""
        key = k.device, k.shape[1]
        if key not in self._spans:
            left_out = self._end - k.shape[1]
            spans = [(row, max(0, pad - left_out), k.shape[1]) for row, pad in enumerate(self.hidden)]
            self._spans[key] = SequenceRanges.of(spans, k.device)
        return self._spans[key]

    def _places_on(self, device: torch.device) -> torch.Tensor:
        """Which of all tokens are queries."""
        if device not in self._places:
            rows = [
                torch.arange((row + 1) * self.n - count, (row + 1) * self.n) for row, count in enumerate(self._counts)
            ]
            self._places[device] = torch.cat(rows).to(device)
        return self._places[device]
