"""``Detokenizer``: the text of an output as its tokens come, and the texts at which it stops. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BEHIND = 6  # tokens before the new ones that are decoded with them, since their text may depend on each other


class Detokenizer:
    """The text of one output.

    A text that may be the beginning of a stop text is held back, so that a stream never shows a part of one.

    Args:
        tokenizer: of the model.
        stop: texts that end the output.
        include_stop: whether the text holds the one that ended it.
        options: of ``tokenizer.decode``.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], include_stop: bool, **options: Any) -> None:
        self._tokenizer, self._stop, self._include_stop, self._options = tokenizer, stop, include_stop, options
        self._tokens: list[int] = []
        self._decoded = 0  # tokens whose text is in ``_text``
        self._text = ""
        self._passed = 0  # characters in which no stop text counts
        self.stopped_at: str | None = None

    @property
    def count(self) -> int:
        """Tokens that it has taken."""
        return len(self._tokens)

    def add(self, tokens: Sequence[int], *, may_stop: bool = True) -> str | None:
        """Takes the next tokens; the stop text that the output holds now, or None.

        Args:
            tokens: the tokens.
            may_stop: whether a stop text in what is new counts.
        """
        if not tokens:
            return None
        self._tokens += tokens
        known, text = self._decode_last()
        if text.endswith("\ufffd"):  # a part of a character
            return None
        return self._extend(text[len(known) :], may_stop)

    def _decode_last(self) -> tuple[str, str]:
        """The text of the last tokens that are decoded, and of these with all that are not decoded yet."""
        before = max(self._decoded - _BEHIND, 0)
        return self._decode(self._tokens[before : self._decoded]), self._decode(self._tokens[before:])

    def _extend(self, new: str, may_stop: bool) -> str | None:
        self._decoded = len(self._tokens)
        searched = len(self._text)
        self._text += new
        if not may_stop:
            self._passed = len(self._text)
            return None
        found = []
        for stop in self._stop:
            at = self._text.find(stop, max(searched - len(stop) + 1, self._passed))
            if at >= 0:
                found.append((at, stop))
        if not found:
            return None
        at, stop = min(found)
        self._text = self._text[: at + len(stop) if self._include_stop else at]
        self.stopped_at = stop
        return stop

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, **self._options)
        return text

    def finish(self) -> None:
        """Takes what is left when the output has ended: also a part of a character."""
        if self.stopped_at is None and self._decoded < len(self._tokens):
            known, text = self._decode_last()
            self._extend(text[len(known) :], may_stop=True)

    def text(self, *, finished: bool) -> str:
        """The text so far; while the output goes on without what may become a stop text."""
        if finished or self.stopped_at is not None:
            return self._text
        held = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._text)), 0, -1):
                if self._text.endswith(stop[:length]):
                    held = max(held, length)
                    break
        return self._text[: len(self._text) - held]
