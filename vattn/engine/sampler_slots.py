"""``SamplerSlots``: which slot of the sampler each output has."""

from __future__ import annotations

from vattn.engine.request import Branch, Status
from vattn.engine.sampler import Sampler
from vattn.engine.tracked import Tracked


class SamplerSlots:
    """Which slot of the sampler each output has, from its first token on until it ends or loses its memory.

    Args:
        sampler: has the slots.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._of: dict[Branch, int] = {}

    def of(self, branch: Branch, tracked: Tracked) -> int:
        """The slot of an output, which is given one where it has none.

        Args:
            branch: the output.
            tracked: its request.
        """
        if branch not in self._of:
            taken = set(self._of.values())
            slot = next(slot for slot in range(self._sampler.slots) if slot not in taken)
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
            self._of[branch] = slot
        return self._of[branch]

    def free(self, *, everything: bool = False) -> None:
        """Takes the slots of outputs that have ended, or that lost their memory; or of all."""
        for branch in list(self._of):
            ended = branch.finish_reason is not None and not branch.in_flight
            if everything or ended or branch.request.status is not Status.RUNNING:
                self._sampler.end(self._of.pop(branch))
