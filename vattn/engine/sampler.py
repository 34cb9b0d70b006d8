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

from vattn.engine.choose import SamplingState, choose
from vattn.engine.last_tokens import LastTokens
from vattn.engine.sampling_params import SamplingParams
from vattn.transfer import Mirror, upload

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

    @property
    def plain(self) -> bool:
        """Whether its logits stay as they are, but for temperature and the limits of what is considered."""
        others = (self.bias, self.allowed, self.bad_words)
        return all(each is None for each in others) and not self.penalized and not self.params.min_tokens

    @property
    def narrows(self) -> bool:
        """Whether it is not greedy and does not consider all tokens."""
        params = self.params
        return not params.greedy and (params.min_p > 0 or params.top_k > 0 or params.top_p < 1)


@dataclass(frozen=True)
class Plan:
    """How the tokens of some rows are sampled. It stays the same while the outputs in the slots do.

    Args:
        slots: the output of each row, int64 ``[n]`` on the device.
        numbers: the same on the host.
        special: the rows of which not all logits count as they are.
        narrowed: the rows that are not greedy and do not consider all tokens, int64 on the device; or None.
        limited: those of them, by their places there, that have ``top_k`` or ``top_p``; or None.
        min_p: whether one of them has ``min_p``.
        logprobs: of how many of the most likely tokens log probabilities are told; -1 of all, None of none.
    """

    slots: torch.Tensor
    numbers: list[int]
    special: list[int]
    narrowed: torch.Tensor | None
    limited: torch.Tensor | None
    min_p: bool
    logprobs: int | None

    @property
    def plain(self) -> bool:
        """Whether ``choose`` chooses all tokens by the logits as they are."""
        return not self.special and self.narrowed is None


class Sampler:
    """Samples tokens from logits.

    Args:
        vocabulary: tokens.
        slots: outputs that there can be at a time.
        device: of the logits.

    Attributes:
        last: the last token of the output in each slot. The slots of outputs are those from 1 on.
    """

    def __init__(self, vocabulary: int, slots: int, device: torch.device) -> None:
        self._vocabulary, self.device, self.slots = vocabulary, device, slots
        self._slots: dict[int, _Slot] = {}
        self.last = LastTokens(slots + 1, device)
        # By slot: temperature and so on; the seed, and the index in the request.
        self._numbers = Mirror((len(_NUMBERS), slots + 1), torch.float32, device)
        self._seeds = Mirror((2, slots + 1), torch.int64, device)
        seeds, indexes = self._seeds.read()
        self._state = SamplingState(self._numbers.read()[0], seeds, indexes, self.last)
        self._history = torch.full((slots + 1, _HISTORY), -1, dtype=torch.int64, device=device)
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
            values = list(params.logit_bias.values())
            bias = upload(list(params.logit_bias), device), upload(values, device, torch.float32)
        if params.allowed_token_ids is not None:
            allowed = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            allowed[upload(list(params.allowed_token_ids), device)] = True
        if bad_words:
            longest = max(map(len, bad_words))
            words = upload([[-1] * (longest - len(word)) + list(word) for word in bad_words], device)
            history = torch.full((_HISTORY,), -1, dtype=torch.int64)
            if recent := list(output[-_HISTORY:]):
                history[-len(recent) :] = torch.tensor(recent)
            self._history[slot] = upload(history, device)
        state = _Slot(params, upload(list(stops), device), bias, allowed, words)
        self._slots[slot] = state
        numbers = {name: float(getattr(params, name)) for name in _NUMBERS}
        self._numbers.write(slot, list({**numbers, **({"temperature": 0.0} if params.greedy else {})}.values()))
        self._seeds.write(slot, [seed, index])
        self._counts.pop(slot, None)
        self._in_prompt.pop(slot, None)
        if state.penalized:
            self._counts[slot] = _counted(output, vocabulary, device)
            self._in_prompt[slot] = _counted(prompt, vocabulary, device) > 0

    def end(self, slot: int) -> None:
        """Lets the output in a slot go."""
        for of_slot in (self._slots, self._counts, self._in_prompt):
            of_slot.pop(slot, None)

    def state(self) -> SamplingState:
        """What ``choose`` needs to know of the outputs in all slots; always the same object."""
        for written in (self._numbers, self._seeds):
            written.read()  # so that what ``self._state`` views is as the host wrote it
        return self._state

    def rehearse(self, logits: torch.Tensor) -> None:
        """Samples with what takes the most memory, so that torch has taken it. No slot may be in use."""
        slots = list(range(1, 1 + min(len(logits), self.slots)))
        params = SamplingParams(temperature=1.0, top_p=0.9, min_p=0.01, logprobs=20)
        try:
            for slot in slots:
                self.begin(slot, params, seed=0, index=0, prompt=())
            plan = self.plan(slots)
            self.sample(logits[: len(slots)], plan, torch.ones_like(plan.slots))
        finally:
            for slot in slots:
                self.end(slot)

    def plan(self, slots: list[int]) -> Plan:
        """How tokens are sampled for the outputs in some slots."""
        states = [self._slots[slot] for slot in slots]
        special = [row for row, state in enumerate(states) if not state.plain]
        narrowed = [row for row, state in enumerate(states) if state.narrows]
        params = [states[row].params for row in narrowed]
        limited = [row for row, each in enumerate(params) if each.top_k > 0 or each.top_p < 1]
        asked = [state.params.logprobs for state in states if state.params.logprobs is not None]
        return Plan(
            slots=upload(slots, self.device),
            numbers=slots,
            special=special,
            narrowed=upload(narrowed, self.device) if narrowed else None,
            limited=upload(limited, self.device) if limited else None,
            min_p=any(each.min_p > 0 for each in params),
            logprobs=None if not asked else -1 if -1 in asked else max(asked),
        )

    def sample(
        self,
        logits: torch.Tensor,
        plan: Plan,
        lengths: torch.Tensor | None = None,
        made: Sequence[int] = (),
        chosen: torch.Tensor | None = None,
    ) -> Sampled:
        """Samples a token for each row.

        Args:
            logits: ``[n, vocabulary]``.
            plan: of the outputs of the rows.
            lengths: positions before the token that is sampled, prompt included, int64 ``[n]`` on the device; None
                where each row is that of its output's last token.
            made: tokens of each output before it; not needed where ``plan.special`` is empty.
            chosen: the tokens, where ``choose`` has chosen them already and ``plan.plain`` holds.
        """
        if chosen is not None:
            return self._told(logits, chosen, plan)
        changed = self._changed(logits.to(torch.float32), plan, made) if plan.special else logits
        if (rows := plan.narrowed) is not None:
            changed = changed.to(torch.float32, copy=True)
            changed[rows] = self._considered(changed[rows], plan.slots[rows], plan)
        tokens = choose(changed, self.state(), plan.slots, lengths)
        self._note(plan, tokens)
        return self._told(logits, tokens, plan)

    def _told(self, logits: torch.Tensor, tokens: torch.Tensor, plan: Plan) -> Sampled:
        """Tokens, and the log probabilities that are asked for."""
        if plan.logprobs is None:
            return Sampled(tokens)
        ids, values, ranks = self.logprobs(logits.to(torch.float32), tokens, plan.logprobs)
        return Sampled(tokens, values, ids, ranks)

    def _changed(self, raw: torch.Tensor, plan: Plan, made: Sequence[int]) -> torch.Tensor:
        """The logits after all that concerns greedy outputs, too."""
        logits = raw.clone()
        for row in plan.special:
            slot = plan.numbers[row]
            state = self._slots[slot]
            if state.allowed is not None:
                logits[row].masked_fill_(~state.allowed, -math.inf)
            if state.bad_words is not None:
                logits[row].index_add_(0, *self._bad_tokens(slot, state.bad_words))
            if made[row] < state.params.min_tokens:
                logits[row, state.stops] = -math.inf
            if state.bias is not None:
                logits[row].index_add_(0, *state.bias)
            if state.penalized:
                self._penalize(logits[row], slot, state.params)
        return logits

    def _bad_tokens(self, slot: int, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last token of each word, and what is added to its logit: -inf where the output ends with the others."""
        prefix = words[:, :-1]
        recent = self._history[slot, _HISTORY - prefix.shape[1] :]
        completes = ((prefix == -1) | (prefix == recent)).all(1)
        return words[:, -1], torch.where(completes, -math.inf, 0.0)

    def _penalize(self, logits: torch.Tensor, slot: int, params: SamplingParams) -> None:
        counts = self._counts[slot]
        seen = self._in_prompt[slot] | (counts > 0)
        penalty = params.repetition_penalty
        logits.copy_(torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits))
        logits -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)

    def _considered(self, logits: torch.Tensor, at: torch.Tensor, plan: Plan) -> torch.Tensor:
        """The logits of rows that do not consider all tokens; -inf for tokens that are not considered."""
        numbers = dict(zip(_NUMBERS, self._numbers.read()[:, at, None], strict=True))
        scaled = logits / numbers["temperature"]
        if plan.min_p:
            least = scaled.amax(-1, keepdim=True) + numbers["min_p"].log()
            scaled = scaled.masked_fill(scaled < least, -math.inf)
        if (rows := plan.limited) is not None:  # only these are sorted
            scaled[rows] = _limited(scaled[rows], numbers["top_k"][rows], numbers["top_p"][rows])
        return logits.masked_fill(scaled == -math.inf, -math.inf)

    def _note(self, plan: Plan, tokens: torch.Tensor) -> None:
        """Notes the tokens of special outputs in the state of their slots."""
        for row in plan.special:
            slot, token = plan.numbers[row], tokens[row, None]
            if self._slots[slot].bad_words is not None:
                self._history[slot] = torch.cat([self._history[slot, 1:], token])
            if (counts := self._counts.get(slot)) is not None:
                counts.index_add_(0, token.clamp_min(0), (token >= 0).to(counts.dtype))

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
