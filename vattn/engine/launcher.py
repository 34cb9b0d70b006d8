"""``Launcher``: computes what the scheduler has decided, and sends the tokens on their way to the host."""

from __future__ import annotations

import torch

from vattn.engine.request import Branch
from vattn.engine.runner import DecodeBatch, Runner
from vattn.engine.sampler import Sampler
from vattn.engine.sampler_slots import SamplerSlots
from vattn.engine.scheduler import Iteration, Row
from vattn.engine.tracker import Tracker
from vattn.transfer import Download, computing_on, upload

_SLICE = 256  # positions of a prompt whose log probabilities are computed at once


class Launcher:
    """Computes iterations: the logits of their positions, and a token for each output.

    The last token of each output and its position stay on the device, by the slot of the output in the sampler. So an
    iteration can be launched before the tokens of the last one were read.

    Args:
        runner: computes logits.
        sampler: chooses tokens.
        tracked: the requests of the outputs.
    """

    def __init__(self, runner: Runner, sampler: Sampler, tracked: Tracker) -> None:
        self._runner, self._sampler, self._tracked = runner, sampler, tracked
        self._slots = SamplerSlots(sampler, tracked)

    @property
    def device(self) -> torch.device:
        """On which it computes."""
        return self._sampler.device

    def free(self) -> None:
        """Forgets the state of outputs that have ended."""
        self._slots.free()

    def forget(self) -> None:
        """Forgets the state of all outputs, after an error: it may hold tokens that nobody will read."""
        self._slots.free(everything=True)

    def rehearse(self, tokens: int, outputs: int) -> None:
        """Computes the largest iteration that there can be, so that torch has taken the memory that it needs.

        Args:
            tokens: positions of the iteration.
            outputs: that are sampled a token each.

        Raises:
            torch.OutOfMemoryError: there is no memory for such an iteration.
            ValueError: there is no memory for K and V of one position.
        """
        with computing_on(self.device), torch.no_grad():
            if (logits := self._runner.rehearse(tokens, outputs)) is not None:
                self._sampler.rehearse(logits)

    def launch(self, iteration: Iteration) -> Download:
        """Computes an iteration, and sends what it samples on its way to the host."""
        decodes, rows = iteration.decodes, iteration.rows
        batch = self._batch(decodes) if decodes else None
        keep = [self._tracked[row.branch.request.id].wanted_of_prompt(row.start, row.count) or 1 for row in rows]
        computed = self._runner.run(batch, rows, [self._tokens(row) for row in rows], keep)
        logits = computed.logits
        for row, each in zip(rows, torch.split(logits[len(decodes) :], keep), strict=True):
            self._note_prompt(row, each)
        if not iteration.into:
            return Download()
        lengths = None
        if rows:
            last, ends, at = list(range(len(decodes))), [], len(decodes)
            for row, kept in zip(rows, keep, strict=True):
                at += kept
                last += [at - 1] * len(row.into)
                ends += [row.start + row.count] * len(row.into)
            if last != list(range(len(logits))):
                logits = logits[upload(last, self.device)]
            lengths = upload(ends, self.device)
            lengths = lengths if batch is None else torch.cat([batch.ends, lengths])
        plan, chosen = self._slots.plan(iteration.into), computed.tokens
        if batch is not None and chosen is not None and not plan.plain:
            # The graph has chosen by the logits as they are, and counted the token. Some outputs want other logits, so
            # tokens are chosen again for the same positions.
            lengths, chosen = batch.ends.long() - 1, None
        made = [branch.sampled - 1 for branch in iteration.into] if plan.special else ()
        sampled = self._sampler.sample(logits, plan, lengths, made, chosen)
        return Download(sampled.tokens, sampled.logprob_tokens, sampled.logprobs, sampled.ranks)

    def _batch(self, decodes: list[Branch]) -> DecodeBatch:
        """The outputs that only miss the position of their last token, which is on the device."""
        return DecodeBatch(decodes, self._slots.plan(decodes).slots, self._sampler.state())

    def _note_prompt(self, row: Row, logits: torch.Tensor) -> None:
        """Notes the log probabilities of the prompt's tokens that a row's logits tell, where they are asked for."""
        tracked = self._tracked[row.branch.request.id]
        if not tracked.wanted_of_prompt(row.start, row.count):
            return
        prompt, end = row.branch.request.prompt, row.start + row.count
        first = end - len(logits)
        told = prompt[first + 1 : end + 1]
        for at in range(0, len(told), _SLICE):
            part = told[at : at + _SLICE]
            chosen = upload(part, self.device)
            parts = self._sampler.logprobs(
                logits[at : at + len(part)].float(), chosen, tracked.params.prompt_logprobs or 0
            )
            for place, each in enumerate(zip(*(one.tolist() for one in parts), strict=True)):
                tracked.note_prompt(first + at + place + 1, *each)

    def _tokens(self, row: Row) -> torch.Tensor:
        """The tokens of a row; one that was not read yet is on the device."""
        branch = row.branch
        known = branch.tokens(row.start, row.start + row.count)
        tokens = upload(known, self.device)
        if len(known) < row.count:
            slot = self._slots.of(branch)
            tokens = torch.cat([tokens, self._sampler.last.tokens[slot : slot + 1]])
        return tokens
