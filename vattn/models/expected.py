"""``Expected``: what transformers gives for a call of a model, to compare vattn's result with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vattn.kernels.check import ROUNDING, TOLERANCE
from vattn.models.attention import attending, own_attention

# What logits may differ by in any case, as a part of their norm.
_LOGITS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-3, torch.float64: 1e-8}
_MOST = 0.5  # what logits may differ by at most, whatever a perturbation does: other models differ by more
_DRAWS = 8  # perturbed computations of a model before its logits are held to be wrong


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The most that a row of logits differs by, of its norm."""
    a, b = ours.float(), theirs.float()
    return float(((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp_min(1e-30)).max())


class Perturbed:
    """A model's own attention, each output of which is moved by a part of itself.

    Args:
        amplitude: by how much, of its norm.
        seed: of the direction.
    """

    own_attention = True
    store = None  # updates of the cache are as ever

    def __init__(self, amplitude: float, seed: int) -> None:
        self._amplitude = amplitude
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def attend_own(self, module: Any, *args: Any, **options: Any) -> Any:
        out, *others = own_attention(module, *args, **options)
        if out.device not in self._generators:
            self._generators[out.device] = torch.Generator(out.device).manual_seed(self._seed)
        noise = torch.empty_like(out, dtype=torch.float32).normal_(generator=self._generators[out.device])
        return (out * (1 + self._amplitude * noise)).to(out.dtype), *others


class Expected:
    """What transformers gives for a call, and whether the last logits of its rows are near enough to it.

    Args:
        compute: the call, as often as it is wanted; each writes its K and V in the place of the last one's.
        configs: of the model.
        spread: what the attention of stock kernels differs by.
        rounded: whether K and V are rounded to fewer bits, where one that is rounded otherwise is a difference of its
            own.
    """

    def __init__(self, compute: Callable[[], Any], configs: list[Any], spread: float, *, rounded: bool) -> None:
        self._output = compute()
        self._logits = self._output[0][:, -1:].clone()
        self._compute, self._configs = compute, configs
        dtype = self._logits.dtype
        self._amplitude = TOLERANCE * max(spread, ROUNDING.get(dtype, 1e-4))
        self.bound = max(_LOGITS.get(dtype, 1e-3), 2e-2 if rounded else 0.0)
        self._draws = 0

    def tells(self) -> bool:
        """Whether something can be told by it."""
        return not bool(torch.isnan(self._logits).any())

    def output(self) -> Any:
        """What transformers gives, whose K and V are those that are stored then."""
        if self._output is None:
            self._output = self._compute()
        return self._output

    def difference(self, ours: torch.Tensor) -> str | None:
        """How logits ``[batch, n, vocabulary]`` of any row differ at the last position, if by more than they may."""
        ours, theirs = ours[:, -1:], self._logits
        if ours.shape != theirs.shape:
            return f"{tuple(ours.shape)} for {tuple(theirs.shape)}"
        worst = relative_error(ours, theirs)
        while self.bound < worst <= _MOST and self._draws < _DRAWS:
            self._draws += 1
            self._output = None
            with attending(Perturbed(self._amplitude, self._draws), self._configs):
                perturbed = self._compute()
            # The worst of few draws is not the worst of all.
            self.bound = max(self.bound, min(_MOST, 1.5 * relative_error(perturbed[0][:, -1:], theirs)))
            del perturbed
        return None if worst <= self.bound else f"by {worst:.2g} of their norm, and may by {self.bound:.2g}"
