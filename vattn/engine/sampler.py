"""``Sampler``: which token each output gets, from the logits of its last position; its state is on the device by slot.

The order of what changes the logits is vLLM's: allowed tokens, bad words, ``min_tokens``, bias, penalties; then for
outputs that are not greedy temperature, ``min_p``, ``top_k`` and ``top_p``. Log probabilities are those of the logits
before all of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vattn.engine.philox import gumbel
from vattn.engine.sampling_params import SamplingParams

_HISTORY = 32  # tokens of an output that are kept on the device, for bad words
MOST_BAD_TOKENS = _HISTORY + 1  # of one of ``bad_words``


@dataclass(frozen=True)
class Sampled:
    """What was sampled for some rows. It lies on the device.

    Args:
        tokens: int64 ``[n]``; -1 where the logits of a row are no numbers.
        logprobs: log probability of the chosen token and of the most likely ones, float32 ``[n, 1 + most]``; None where
            no row asks for it.
        logprob_tokens: the tokens that these are of, int64 ``[n, 1 + most]``.
        ranks: how many tokens are at least as likely as the chosen one, int64 ``[n]``.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor | None = None
    logprob_tokens: torch.Tensor | None = None
    ranks: torch.Tensor | None = None


@dataclass
class _Slot:
    """What the host knows of the output in a slot.

    Args:
        params: of its request.
        stops: tokens that are not chosen before ``min_tokens``.
        bias: the tokens of ``logit_bias``, int64, and what is added to them, float32; None where there is none.
        allowed: a bool for each token; None where all are.
        bad_words: token ids of each, padded on the left by -1 to one length, int64 ``[words, length]``; or None.
    """

    params: SamplingParams
    stops: torch.Tensor
    bias: tuple[torch.Tensor, torch.Tensor] | None
    allowed: torch.Tensor | None
    bad_words: torch.Tensor | None

    @property
    def penalized(self) -> bool:
        params = self.params
        return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


class Sampler:
    """Samples tokens from logits.

    Args:
        vocabulary: tokens.
        slots: outputs that there can be at a time.
        device: of the logits.
    """

    def __init__(self, vocabulary: int, slots: int, device: torch.device) -> None:
        self._vocabulary, self.device, self.slots = vocabulary, device, slots
        self._slots: dict[int, _Slot] = {}
        self._numbers = torch.zeros(len(_NUMBERS), slots, dtype=torch.float32, device=device)
        self._seeds = torch.zeros(2, slots, dtype=torch.int64, device=device)  # the seed, and the index in the request
        self._history = torch.full((slots, _HISTORY), -1, dtype=torch.int64, device=device)
        # Of outputs with penalties: how often each token is in the output, and whether it is in the prompt.
        self._counts: dict[int, torch.Tensor] = {}
        self._in_prompt: dict[int, torch.Tensor] = {}

    def begin(
        self,
        slot: int,
        params: SamplingParams,
        *,
        seed: int,
        index: int,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        stops: Sequence[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
    ) -> None:
        """Takes an output into a slot.

        Args:
            slot: the slot.
            params: of its request.
            seed: of the request.
            index: which of the request's outputs it is.
            prompt: tokens of the prompt.
            output: tokens that it has already.
            stops: end tokens and ``stop_token_ids``.
            bad_words: the token ids of ``params.bad_words``, at most ``MOST_BAD_TOKENS`` each.
        """
        device, vocabulary = self.device, self._vocabulary
        bias = allowed = words = None
        if params.logit_bias:
            tokens = torch.tensor(list(params.logit_bias), device=device)
            bias = tokens, torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        if params.allowed_token_ids is not None:
            allowed = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            allowed[torch.tensor(params.allowed_token_ids, device=device)] = True
        if bad_words:
            longest = max(map(len, bad_words))
            rows = [[-1] * (longest - len(word)) + list(word) for word in bad_words]
            words = torch.tensor(rows, device=device)
        state = _Slot(params, torch.tensor(list(stops), dtype=torch.int64, device=device), bias, allowed, words)
        self._slots[slot] = state
        self._numbers[:, slot] = torch.tensor([float(getattr(params, name)) for name in _NUMBERS])
        self._seeds[:, slot] = torch.tensor([seed, index])
        self._history[slot] = -1
        if recent := list(output[-_HISTORY:]):
            self._history[slot, -len(recent) :] = torch.tensor(recent)
        self._counts.pop(slot, None)
        self._in_prompt.pop(slot, None)
        if state.penalized:
            self._counts[slot] = _counted(output, vocabulary, device)
            self._in_prompt[slot] = _counted(prompt, vocabulary, device) > 0

    def last_token(self, slot: int) -> torch.Tensor:
        """The last token of the output in a slot, int64 ``[1]`` on the device; 0 where its logits were no numbers."""
        return self._history[slot, -1:].clamp_min(0)

    def end(self, slot: int) -> None:
        """Lets the output in a slot go."""
        for of_slot in (self._slots, self._counts, self._in_prompt):
            of_slot.pop(slot, None)

    def sample(
        self, logits: torch.Tensor, slots: Sequence[int], lengths: Sequence[int], made: Sequence[int]
    ) -> Sampled:
        """Samples a token for each row.

        Args:
            logits: ``[n, vocabulary]``.
            slots: the output of each row.
            lengths: positions before the token that is sampled, prompt included.
            made: tokens of the output before it.
        """
        raw = logits.to(torch.float32)
        states = [self._slots[slot] for slot in slots]
        changed = self._changed(raw, slots, states, made)
        tokens = changed.argmax(-1)
        chance = [row for row, state in enumerate(states) if not state.params.greedy]
        if chance:
            rows = torch.tensor(chance, device=self.device)
            at = torch.tensor([slots[row] for row in chance], device=self.device)
            positions = torch.tensor([lengths[row] for row in chance], device=self.device)
            considered = self._considered(changed[rows], at, [states[row].params for row in chance])
            noise = gumbel(self._seeds[0, at], self._seeds[1, at], positions, self._vocabulary)
            tokens[rows] = (considered + noise).argmax(-1)
        tokens = torch.where(changed.amax(-1).isfinite() & ~changed.isnan().any(-1), tokens, -1)
        self._note(slots, tokens)
        return self._with_logprobs(raw, tokens, states)

    def _changed(
        self, raw: torch.Tensor, slots: Sequence[int], states: list[_Slot], made: Sequence[int]
    ) -> torch.Tensor:
        """The logits after all that concerns greedy outputs, too."""
        logits = raw.clone()
        for row, (slot, state) in enumerate(zip(slots, states, strict=True)):
            if state.allowed is not None:
                logits[row].masked_fill_(~state.allowed, -math.inf)
            if state.bad_words is not None:
                logits[row, self._bad_tokens(slot, state.bad_words)] = -math.inf
            if made[row] < state.params.min_tokens:
                logits[row, state.stops] = -math.inf
            if state.bias is not None:
                logits[row].index_add_(0, *state.bias)
            if state.penalized:
                self._penalize(logits[row], slot, state.params)
        return logits

    def _bad_tokens(self, slot: int, words: torch.Tensor) -> torch.Tensor:
        """The last tokens of those words whose other tokens the output ends with."""
        prefix = words[:, :-1]
        recent = self._history[slot, _HISTORY - prefix.shape[1] :]
        return words[((prefix == -1) | (prefix == recent)).all(1), -1]

    def _penalize(self, logits: torch.Tensor, slot: int, params: SamplingParams) -> None:
        counts = self._counts[slot]
        seen = self._in_prompt[slot] | (counts > 0)
        penalty = params.repetition_penalty
        logits.copy_(torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits))
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)

    def _considered(self, logits: torch.Tensor, at: torch.Tensor, params: list[SamplingParams]) -> torch.Tensor:
        """The logits over the temperature of rows that are not greedy; -inf for tokens that are not considered."""
        numbers = dict(zip(_NUMBERS, self._numbers[:, at, None], strict=True))
        logits = logits / numbers["temperature"]
        if any(each.min_p > 0 for each in params):
            least = logits.amax(-1, keepdim=True) + numbers["min_p"].log()
            logits = logits.masked_fill(logits < least, -math.inf)
        limited = [row for row, each in enumerate(params) if each.top_k > 0 or each.top_p < 1]
        if limited:  # only these are sorted
            rows = torch.tensor(limited, device=self.device)
            logits[rows] = _limited(logits[rows], numbers["top_k"][rows], numbers["top_p"][rows])
        return logits

    def _note(self, slots: Sequence[int], tokens: torch.Tensor) -> None:
        """Notes the tokens in the state of their slots."""
        at = torch.tensor(list(slots), device=self.device)
        self._history[at] = torch.cat([self._history[at, 1:], tokens[:, None]], 1)
        for row, slot in enumerate(slots):
            if (counts := self._counts.get(slot)) is not None:
                counts.index_add_(0, tokens[row, None].clamp_min(0), (tokens[row, None] >= 0).to(counts.dtype))

    def _with_logprobs(self, raw: torch.Tensor, tokens: torch.Tensor, states: list[_Slot]) -> Sampled:
        asked = [state.params.logprobs for state in states if state.params.logprobs is not None]
        if not asked:
            return Sampled(tokens)
        ids, values, ranks = self.logprobs(raw, tokens, -1 if -1 in asked else max(asked))
        return Sampled(tokens, values, ids, ranks)

    def logprobs(
        self, logits: torch.Tensor, tokens: torch.Tensor, most: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The log probabilities of tokens, and of the most likely ones.

        Args:
            logits: float32 ``[n, vocabulary]``.
            tokens: int64 ``[n]``.
            most: how many of the most likely tokens; -1 is all.

        Returns:
            The token itself and the most likely ones, int64 ``[n, 1 + most]``; their log probabilities; and how many
            tokens are at least as likely as the token itself, int64 ``[n]``.
        """
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, tokens.clamp_min(0)[:, None])
        values, ids = logprobs.topk(self._vocabulary if most < 0 else min(most, self._vocabulary), -1)
        ranks = (logprobs >= chosen).sum(-1)
        return torch.cat([tokens[:, None], ids], 1), torch.cat([chosen, values], 1), ranks


_NUMBERS = ("temperature", "top_k", "top_p", "min_p")


def _limited(logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Leaves the ``top_k`` most likely tokens (0 is all), and of those the fewest that add up to ``top_p``."""
    values, order = logits.sort(stable=True, dim=-1, descending=True)
    ranks = torch.arange(logits.shape[1], device=logits.device)[None]
    last = values.gather(1, (top_k.long() - 1).clamp(0, logits.shape[1] - 1))
    values = values.masked_fill((top_k > 0) & (values < last), -math.inf)  # tokens as likely as the last one stay
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    values = values.masked_fill((before >= top_p) & (ranks > 0), -math.inf)
    return torch.full_like(logits, -math.inf).scatter_(1, order, values)


def _counted(tokens: Sequence[int], vocabulary: int, device: torch.device) -> torch.Tensor:
    """How often each token occurs, int32 ``[vocabulary]``."""
    return torch.bincount(torch.tensor(list(tokens), dtype=torch.int64), minlength=vocabulary).to(device, torch.int32)
