"""``SamplerSlots``: which slot of the sampler each output has."""

from __future__ import annotations

from vattn.engine.request import Branch, Status
from vattn.engine.sampler import Plan, Sampler
from vattn.engine.tracker import Tracker


class SamplerSlots:
    """Which slot of the sampler each output has, from its first token on until it ends or loses its memory.

    Args:
        sampler: has the slots.
        tracked: the requests of the outputs.
    """

    def __init__(self, sampler: Sampler, tracked: Tracker) -> None:
        self._sampler, self._tracked = sampler, tracked
        self._of: dict[Branch, int] = {}
        self._free = list(range(1, 1 + sampler.slots))
        self._planned: tuple[list[Branch], Plan] | None = None

    def of(self, branch: Branch) -> int:
        """The slot of an output that has one."""
        return self._of[branch]

    def plan(self, branches: list[Branch]) -> Plan:
        """How the next token of some outputs is sampled. Outputs without a slot are given one."""
        if self._planned is not None and self._planned[0] == branches:
            return self._planned[1]
        if new := [branch for branch in branches if branch not in self._of]:
            self.free()
            for branch in new:
                self._begin(branch)
        plan = self._sampler.plan([self._of[branch] for branch in branches])
        self._planned = list(branches), plan
        return plan

    def _begin(self, branch: Branch) -> None:
        tracked = self._tracked[branch.request.id]
        slot = self._free[-1]  # which stays free where ``begin`` raises an error
        self._sampler.begin(
            slot,
            tracked.params,
            seed=tracked.seed,
            index=branch.index,
            prompt=branch.request.prompt,
            output=branch.output,
            stops=tracked.stop_tokens,
            bad_words=tracked.bad_words,
        )
        self._of[branch] = self._free.pop()

    def free(self, *, everything: bool = False) -> None:
        """Takes the slots of outputs that have ended, or that lost their memory; or of all."""
        self._planned = None
        for branch in list(self._of):
            ended = branch.finish_reason is not None and not branch.in_flight
            if everything or ended or branch.request.status is not Status.RUNNING:
                self._free.append(self._of.pop(branch))
                self._sampler.end(self._free[-1])
