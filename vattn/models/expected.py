"""``Expected``: what transformers computes for a call of a model, for comparison with vattn's result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vattn.kernels.check import ROUNDING, TOLERANCE, relative_errors
from vattn.models.attention import attending, own_attention

# The deviation of logits that is allowed in any case, relative to their norm.
_LOGITS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-3, torch.float64: 1e-8}
_MOST = 0.5  # the largest deviation that is ever allowed; the logits of another model deviate by more
_DRAWS = 8  # perturbed computations of a model before logits that deviate are taken to be wrong


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest deviation of a row of logits, relative to the norm of the row."""
    return float(relative_errors(ours.float().flatten(1), theirs.float().flatten(1)).max())


class Perturbed:
    """Computes a model's own attention, and adds random noise to each output.

    Args:
        amplitude: the standard deviation of the noise, relative to each element.
        seed: the seed of the noise.
    """

    own_attention = True
    store = None  # updates of the cache are not those of a decode step, see ``VirtualCache.update``

    def __init__(self, amplitude: float, seed: int) -> None:
        self._amplitude = amplitude
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def attend_own(self, module: Any, *args: Any, **options: Any) -> Any:
        """The module's own attention with noise; arguments as in ``own_attention``."""
        out, *others = own_attention(module, *args, **options)
        if out.device not in self._generators:
            self._generators[out.device] = torch.Generator(out.device).manual_seed(self._seed)
        noise = torch.empty_like(out, dtype=torch.float32).normal_(generator=self._generators[out.device])
        return (out * (1 + self._amplitude * noise)).to(out.dtype), *others


class Expected:
    """What transformers computes for a call, and how far the last logits of each row may deviate from it.

    Args:
        compute: calls the model. It may be called several times, each time overwriting the K and V of the last one.
        configs: the configurations of the model.
        spread: the largest error of stock attention kernels, see ``Comparison``.
        rounded: whether K and V are rounded to fewer bits. An element that is rounded to the neighbouring value then
            makes a difference by itself, so more is allowed.
        compiled: whether what is compared is computed by compiled code, which rounds fewer intermediate values.

    Attributes:
        bound: the deviation that is allowed so far, relative to the norm of the logits.
    """

    def __init__(
        self, compute: Callable[[], Any], configs: list[Any], spread: float, *, rounded: bool, compiled: bool = False
    ) -> None:
        self._output = compute()
        self._logits = self._output[0][:, -1:].clone()
        self._compute, self._configs = compute, configs
        dtype = self._logits.dtype
        self._amplitude = TOLERANCE * max(spread, ROUNDING.get(dtype, 1e-4))
        self.bound = max(_LOGITS.get(dtype, 1e-3) * (TOLERANCE if compiled else 1), 2e-2 if rounded else 0.0)
        self._draws = 0

    def tells(self) -> bool:
        """Whether logits can be compared with these, which must not be NaN."""
        return not bool(torch.isnan(self._logits).any())

    def output(self) -> Any:
        """The output of transformers. When this returns, the cache holds the K and V of that computation."""
        if self._output is None:
            self._output = self._compute()
        return self._output

    def difference(self, ours: torch.Tensor) -> str | None:
        """Compares logits at the last position of each row.

        Where they deviate by more than is allowed so far, the model is computed with perturbed attention, up to
        ``_DRAWS`` times, to see how far the logits of this model may deviate.

        Args:
            ours: ``[batch, n, vocabulary]``.

        Returns:
            A description of the difference where it is larger than allowed, else None.
        """
        ours, theirs = ours[:, -1:], self._logits
        if ours.shape != theirs.shape:
            return f"{tuple(ours.shape)} for {tuple(theirs.shape)}"
        worst = relative_error(ours, theirs)
        while self.bound < worst <= _MOST and self._draws < _DRAWS:
            self._draws += 1
            self._output = None
            with attending(Perturbed(self._amplitude, self._draws), self._configs):
                perturbed = self._compute()
            # Other draws may deviate by more than these few, so the bound is 1.5 times their deviation.
            self.bound = max(self.bound, min(_MOST, 1.5 * relative_error(perturbed[0][:, -1:], theirs)))
            del perturbed
        return None if worst <= self.bound else f"by {worst:.2g} of their norm, and may by {self.bound:.2g}"
