"""``Prompt``: a call of a Hugging Face model with several tokens for each row, with its attention on stock kernels."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Literal

import torch

from vattn import kernels
from vattn.kernels import AttentionParams, AttentionSpec, Kernel, SequenceRanges, alike
from vattn.models.attention import UnsupportedError, attending

if TYPE_CHECKING:
    from vattn.hf.watch import PromptWatch

# For each kind of prompt, the kernels that are faster than what transformers calls and need no compilation, see
# docs/benchmarks.md.
_FASTER = {"first": ("fa3",), "padded": ("fa3", "fa2"), "chunk": ("fa3", "fa2")}


class Prompt:
    """The tokens that a call appends to the rows of a batch, several for each.

    Args:
        hidden: for each row, positions on the left that its attention mask hides.
        start: positions that the cache holds, padding included.
        n: tokens of each row, padding included.
        windows: the sliding window of each layer, or None.
        attention: the name of the kernel, or ``"auto"`` for one that is faster than transformers' own.

    Attributes:
        watch: compares the attention of each layer, where the prompt is verified.
        slower: whether no kernel was found that computes it faster than transformers.
    """

    store = None  # layers are updated as without kernels, see ``VirtualCache.update``
    own_attention = False  # the attention is vattn's, not the model's own, see ``models.attention``

    def __init__(self, hidden: list[int], start: int, n: int, windows: list[int | None], attention: str) -> None:
        self.hidden, self.start, self.n = hidden, start, n
        self.watch: PromptWatch | None = None
        self.slower = False
        self._counts = [min(n, start + n - pad) for pad in hidden]  # tokens of each row that are not padding
        self._windows = windows
        self._attention = attention
        self._ranges: dict[Any, SequenceRanges] = {}
        self._queries: dict[torch.device, torch.Tensor] = {}

    @property
    def kind(self) -> Literal["first", "padded", "chunk"]:
        """Whether it is the first prompt of its rows, the first with padding, or a later chunk."""
        if self.start:
            return "chunk"
        return "padded" if any(self.hidden) else "first"

    @property
    def binding_windows(self) -> frozenset[int]:
        """The sliding windows that hide positions from the last token."""
        return frozenset(window for window in self._windows if window is not None and window < self.start + self.n)

    def run(self, configs: list[Any]) -> contextlib.AbstractContextManager[None]:
        """Within this context the model with these configurations computes the prompt."""
        return attending(self, configs)

    def attend(
        self, at: int | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: AttentionParams
    ) -> torch.Tensor:
        """Computes the attention of one layer on all K and V that the cache returned.

        Args:
            at: the index of the layer; None where the module has none.
            q: ``[batch, query_heads, n, head_dim]``.
            k: ``[batch, kv_heads, positions, head_dim]``, as the cache returned it.
            v: ``[batch, kv_heads, positions, v_head_dim]``.
            how: scale, softcap, sinks and window.

        Returns:
            ``[batch, n, query_heads, v_head_dim]``, zeros where a query is padding.

        Raises:
            UnsupportedError: q or k have other positions than those of this prompt, no kernel computes it, or none is
                faster than transformers.
        """
        if at is None or q.shape[2] != self.n or k.shape[2] > self.start + self.n:
            raise UnsupportedError("its attention is of other rows than it is given")
        batch, heads, n, _ = q.shape
        windows = [window for window in (self._windows[at], how.window) if window is not None]
        how = AttentionParams(scale=how.scale, softcap=how.softcap, sinks=how.sinks, window=min(windows, default=None))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if not alike(k, v):  # k and v are tensors of the model, not views of the cache
            k, v = k.contiguous(), v.contiguous()
        kernel, ranges = self._kernel_for(q, k, v, how), self._ranges_of(k)
        packed = q.reshape(batch * n, heads, -1)
        if not any(self.hidden):
            out = kernel.prefill(packed, k, v, ranges, self._counts, how)
        else:
            queries = self._queries_on(q.device)
            seen = kernel.prefill(packed[queries], k, v, ranges, self._counts, how)
            out = seen.new_zeros(batch * n, *seen.shape[1:]).index_copy_(0, queries, seen)
        out = out.view(batch, n, *out.shape[1:])
        if self.watch is not None:
            self.watch.attended(at, kernel, q, k, v, out, how)
        return out

    def _kernel_for(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: AttentionParams) -> Kernel:
        options: dict[str, Any] = {"softcap": how.softcap is not None, "sinks": how.sinks is not None}
        queries = "chunk" if self.start else "first"
        spec = AttentionSpec.of(q, k, v, queries=queries, window=how.window is not None, **options)
        names = _FASTER[self.kind] if self._attention == "auto" else (self._attention,)
        for name in names:
            with contextlib.suppress(ValueError):
                return kernels.choose(spec, name=name)
        self.slower = True
        raise UnsupportedError("no kernel is faster than transformers' own")

    def _ranges_of(self, k: torch.Tensor) -> SequenceRanges:
        """Returns which positions of ``k`` ``[batch, positions, kv_heads, dim]`` are rows of the sequences.

        ``k`` may begin behind the first position, where a sliding window has passed it.
        """
        key = k.device, k.shape[1]
        if key not in self._ranges:
            left_out = self.start + self.n - k.shape[1]
            ranges = [(row, max(0, pad - left_out), k.shape[1]) for row, pad in enumerate(self.hidden)]
            self._ranges[key] = SequenceRanges.of(ranges, k.device)
        return self._ranges[key]

    def _queries_on(self, device: torch.device) -> torch.Tensor:
        """Returns the indices of the tokens that are not padding, among the ``batch * n`` tokens of all rows."""
        if device not in self._queries:
            rows = [
                torch.arange((row + 1) * self.n - count, (row + 1) * self.n) for row, count in enumerate(self._counts)
            ]
            self._queries[device] = torch.cat(rows).to(device)
        return self._queries[device]
