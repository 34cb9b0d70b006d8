"""``Tracked``: a request as its caller sees it: texts, log probabilities, reasons, and the outputs made of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vattn.engine.detokenizer import Detokenizer
from vattn.engine.outputs import CompletionOutput, Logprob, Logprobs, RequestOutput
from vattn.engine.request import Branch, FinishReason, Request, Status
from vattn.engine.sampling_params import SamplingParams


class Tracked:
    """A request as its caller sees it.

    Args:
        request: as the scheduler sees it.
        params: how its tokens are chosen.
        prompt: its text, or None.
        seed: of its random numbers.
        ends: end tokens of the model.
        tokenizer: of the model, or None.
    """

    def __init__(
        self,
        request: Request,
        params: SamplingParams,
        prompt: str | None,
        seed: int,
        ends: tuple[int, ...],
        tokenizer: Any,
    ) -> None:
        self.request, self.params, self.seed = request, params, seed
        self._prompt, self._tokenizer = prompt, tokenizer
        self._ends = () if params.ignore_eos else ends
        self.bad_words = _encoded(tokenizer, params.bad_words or ())
        texts = params.detokenize and tokenizer is not None
        self._texts = [self._detokenizer() for _ in range(params.n)] if texts else []
        self._logprobs: list[list[Logprobs]] = [[] for _ in range(params.n)]
        self._prompt_logprobs: dict[int, Logprobs] = {}
        self._stop_reasons: list[int | str | None] = [None] * params.n

    def _detokenizer(self) -> Detokenizer:
        return Detokenizer(
            self._tokenizer,
            tuple(self.params.stop or ()),
            self.params.include_stop_str_in_output,
            skip_special_tokens=self.params.skip_special_tokens,
            spaces_between_special_tokens=self.params.spaces_between_special_tokens,
        )

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Tokens that end an output."""
        return self._ends + tuple(self.params.stop_token_ids or ())

    @property
    def watched(self) -> bool:
        """Whether an output may end behind any token, because of the text that it has then."""
        return bool(self._texts and self.params.stop)

    def stops(self, branch: Branch) -> FinishReason | None:
        """Takes the last token of an output; why the output ends behind it, or None."""
        token = branch.output[-1]
        ends = token in self.stop_tokens
        stopped_at = None
        texts = self._texts[branch.index] if self._texts else None
        shown = len(branch.output) - (ends and not self.params.include_stop_str_in_output)
        if texts is not None and self.watched:
            for place in range(texts.count, shown):  # more than one where an error came in between
                texts.add([branch.output[place]], may_stop=not ends and place >= self.params.min_tokens)
            stopped_at = texts.stopped_at
        elif texts is not None and (ends or len(branch.output) >= branch.max_tokens):
            texts.add(branch.output[texts.count : shown], may_stop=False)  # here an error ends this output alone
        if ends:
            self._stop_reasons[branch.index] = None if token in self._ends else token
        elif stopped_at is None:
            return None
        else:
            self._stop_reasons[branch.index] = stopped_at
        return FinishReason.STOP

    def note_logprobs(self, branch: Branch, tokens: list[int], values: list[float], rank: int) -> None:
        """Takes the log probabilities at an output's next token: of that token, and of the most likely ones."""
        if self.params.logprobs is not None and branch.finish_reason is None:
            entries = self._logprobs[branch.index]
            del entries[len(branch.output) :]  # of a token that an error has taken back
            entries.append(self._entries(tokens, values, rank, self.params.logprobs))

    def wanted_of_prompt(self, start: int, count: int) -> int:
        """Of how many last positions of a row the logits tell a token of the prompt that is asked for."""
        if self.params.prompt_logprobs is None or start >= len(self.request.prompt) - 1:
            return 0
        return count

    def note_prompt(self, position: int, tokens: list[int], values: list[float], rank: int) -> None:
        """Takes the log probabilities at a position of the prompt."""
        asked = self.params.prompt_logprobs
        assert asked is not None
        self._prompt_logprobs[position] = self._entries(tokens, values, rank, asked)

    def _entries(self, tokens: list[int], values: list[float], rank: int, asked: int) -> Logprobs:
        most = len(tokens) - 1 if asked < 0 else asked
        entries: Logprobs = {tokens[0]: Logprob(values[0], rank, self._text_of(tokens[0]))}
        for place, (token, value) in enumerate(zip(tokens[1 : most + 1], values[1 : most + 1], strict=True), 1):
            entries.setdefault(token, Logprob(value, place, self._text_of(token)))
        return entries

    def _text_of(self, token: int) -> str | None:
        if self._tokenizer is None:
            return None
        try:
            text: str = self._tokenizer.decode([token])
        except Exception:  # a token without a text
            return None
        return text

    def output(self) -> RequestOutput:
        """What there is of the request so far."""
        request = self.request
        return RequestOutput(
            request_id=request.id,
            prompt=self._prompt,
            prompt_token_ids=list(request.prompt),
            prompt_logprobs=self._prompt_entries(),
            outputs=[self._completion(branch) for branch in request.branches],
            finished=request.status is Status.FINISHED,
            num_cached_tokens=request.cached,
            error=request.error,
        )

    def _prompt_entries(self) -> list[Logprobs | None] | None:
        if self.params.prompt_logprobs is None:
            return None
        return [self._prompt_logprobs.get(position) for position in range(len(self.request.prompt))]

    def _completion(self, branch: Branch) -> CompletionOutput:
        reason, text, logprobs, total = branch.finish_reason, "", None, None
        if self._texts:
            detokenizer = self._texts[branch.index]
            if reason is not FinishReason.ERROR:  # which may be the text's
                if not self.watched:  # else it has the tokens already
                    hides = reason is FinishReason.STOP and not self.params.include_stop_str_in_output
                    detokenizer.add(branch.output[detokenizer.count : len(branch.output) - hides], may_stop=False)
                if reason is not None:
                    detokenizer.finish()
            text = detokenizer.text(finished=reason is not None)
        if self.params.logprobs is not None:
            logprobs = self._logprobs[branch.index][: len(branch.output)]
            total = sum(each[token].logprob for token, each in zip(branch.output, logprobs, strict=True))
        return CompletionOutput(
            index=branch.index,
            text=text,
            token_ids=list(branch.output),
            cumulative_logprob=total,
            logprobs=logprobs,
            finish_reason=None if reason is None else reason.value,
            stop_reason=self._stop_reasons[branch.index],
        )


def _encoded(tokenizer: Any, words: Iterable[str]) -> list[list[int]]:
    """The token ids of words, at the start of a text and behind a space, where that is one more word of as many tokens.

    Raises:
        ValueError: a word has no tokens.
    """
    found: list[list[int]] = []
    for word in words:
        plain, spaced = (
            list(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False)) for prefix in ("", " ")
        )
        if not plain:
            raise ValueError(f"bad_words has {word!r}, which has no tokens")
        found.append(plain)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    return found
