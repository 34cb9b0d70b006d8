"""``Request``: what a caller asked for, and how far it is; ``Branch``: one of its outputs. No torch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum


class Status(Enum):
    """Where a request is."""

    WAITING = "waiting"  # it holds no memory
    RUNNING = "running"
    SWAPPED = "swapped"  # its rows are in host memory
    FINISHED = "finished"


class FinishReason(str, Enum):
    """Why an output has ended; the words are those of vLLM and OpenAI."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(eq=False, slots=True)
class Branch:
    """One output of a request. Its tokens are those of the prompt, and those that were sampled behind them.

    Positions count from the first token of the prompt. An iteration is in flight from its launch until the tokens that
    it has sampled were read.

    Args:
        request: the request that it is an output of.
        index: which of the request's outputs it is.
        max_tokens: of the request.

    Attributes:
        output: the sampled tokens that were read.
        launched: positions whose K and V were computed, or are computed by an iteration in flight.
        sampled: how many tokens were sampled, those that iterations in flight sample included.
        stop_tokens: tokens behind which it may end; None where it may end behind any.
        in_flight: iterations in flight that it is part of.
        finish_reason: why it has ended; None while it goes on.
        opened: whether it holds memory.
    """

    request: Request
    index: int
    max_tokens: int
    output: list[int] = field(default_factory=list)
    launched: int = 0
    sampled: int = 0
    stop_tokens: frozenset[int] | None = None
    in_flight: int = 0
    finish_reason: FinishReason | None = None
    opened: bool = False

    @property
    def length(self) -> int:
        """Tokens that it has, those included that are sampled by iterations in flight."""
        return len(self.request.prompt) + self.sampled

    @property
    def pending(self) -> int:
        """Tokens that iterations in flight will sample."""
        return self.sampled - len(self.output)

    def tokens(self, start: int, end: int) -> list[int]:
        """Its tokens from position ``start`` up to ``end``, as far as they were read; no others are copied."""
        prompt = self.request.prompt
        behind = slice(max(start - len(prompt), 0), max(end - len(prompt), 0))
        return [*prompt[start:end], *self.output[behind]]

    @property
    def missing(self) -> int:
        """Positions that are still to be computed before the next token can be sampled."""
        if self.finish_reason is not None or self.sampled >= self.max_tokens:
            return 0
        return self.length - self.launched

    @property
    def confirmed(self) -> int:
        """Positions whose K and V are computed from tokens that were read, and that therefore others may go on from."""
        return min(self.launched, len(self.request.prompt) + max(len(self.output) - 1, 0))


@dataclass(eq=False)
class Request:
    """What a caller asked for.

    Args:
        id: names it.
        prompt: token ids, at least one.
        max_tokens: tokens to sample at most, for each output.
        n: outputs.
        priority: requests with a lower number are served first, where the policy heeds it.
        tenant: on whose behalf, for policies that share out service.
        namespace: prefixes are shared with requests of the same namespace only.
        reuse_prefix: whether it may begin behind rows that other requests have computed.
        arrival: time at which it came, in seconds.
        deadline: time at which it is aborted, in seconds; None for never.

    Attributes:
        status: where it is.
        branches: its outputs.
        cached: positions of the prompt that it found computed when it began.
        prompt_known: whether others may begin behind its prompt, which was computed.
        enqueued: the iteration at which it came.
        overdue: whether it has waited for so long that it is served first from now on.
        refusals: iterations one after the other in which it found no memory.
        refused: the last of them.
        preemptions: how often it lost its memory to others.
        error: what went wrong, if something did.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    n: int = 1
    priority: int = 0
    tenant: str = ""
    namespace: Hashable = None
    reuse_prefix: bool = True
    arrival: float = 0.0
    deadline: float | None = None

    status: Status = Status.WAITING
    branches: list[Branch] = field(default_factory=list)
    cached: int = 0
    prompt_known: bool = False
    enqueued: int = 0
    overdue: bool = False
    refusals: int = 0
    refused: int = 0
    preemptions: int = 0
    error: str | None = None

    def __post_init__(self) -> None:
        self.branches = [Branch(self, index, self.max_tokens) for index in range(self.n)]

    @property
    def live(self) -> list[Branch]:
        """The outputs that go on."""
        return [branch for branch in self.branches if branch.finish_reason is None]

    @property
    def trunk(self) -> Branch:
        """The output that computes the prompt for all of them, even where it has ended since."""
        opened = (branch for branch in self.branches if branch.opened)
        return next(opened, None) or next(iter(self.live), self.branches[0])

    @property
    def shared(self) -> bool:
        """Whether outputs have no memory of their own yet: they get it once the trunk has computed the prompt."""
        return any(not branch.opened for branch in self.live)

    @property
    def in_flight(self) -> bool:
        """Whether an iteration in flight computes one of its outputs."""
        return any(branch.in_flight for branch in self.branches)

    @property
    def most_tokens(self) -> int:
        """Positions that its longest output may come to have."""
        return len(self.prompt) + self.max_tokens

    @property
    def held_positions(self) -> int:
        """Positions that it would hold memory for if it ran: the prompt once, and what each output has sampled."""
        live = self.live
        return len(self.prompt) + sum(branch.sampled for branch in live) if live else 0
