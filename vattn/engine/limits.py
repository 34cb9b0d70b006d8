"""``Limits``: how much an iteration computes at most, which may be less for a while. No torch."""

from __future__ import annotations

_LEAST_TOKENS = 16  # that ``narrow`` leaves to an iteration


class Limits:
    """How much an iteration computes at most, which may be less for a while.

    Args:
        seqs: outputs that run at the same time.
        tokens: positions that an iteration computes.

    Attributes:
        seqs: the same, as it is now.
        tokens: the same, as it is now.
        most_seqs: what ``seqs`` was at first.
    """

    def __init__(self, seqs: int, tokens: int) -> None:
        self.seqs, self.tokens = self.most_seqs, self._most_tokens = seqs, tokens

    def narrow(self) -> bool:
        """Halves the positions, or else the outputs; False for the least."""
        if self.tokens > _LEAST_TOKENS:
            self.tokens = max(self.tokens // 2, _LEAST_TOKENS)
        elif self.seqs > 1:
            self.seqs //= 2
        else:
            return False
        return True

    def widen(self) -> None:
        """Takes the last ``narrow`` back, if there was one."""
        if self.seqs < self.most_seqs:
            self.seqs = min(2 * self.seqs, self.most_seqs)
        else:
            self.tokens = min(2 * self.tokens, self._most_tokens)
