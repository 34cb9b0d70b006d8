"""``DecodeGraph``: the decode steps of one model with so many rows, and the CUDA graph that they become."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from vattn.graphs.runner import GraphRunner
from vattn.hf.attach import Forward, Greedy, greedy
from vattn.hf.decode_context import DecodeContext
from vattn.hf.step_call import StepCall
from vattn.models.attention import PassthroughCache, UnsupportedError
from vattn.models.expected import relative_error
from vattn.models.state import ModelState


class TestedSteps:
    """Which kinds of steps agreed with transformers' own.

    A kind is whether rows are padded, whether rows are idle, which sliding windows are full, and for replays whether
    the step is as long as the one that was captured.

    Args:
        windows: of the layers.
    """

    __test__ = False  # pytest takes it for a test else

    def __init__(self, windows: list[int]) -> None:
        self._windows = windows  # that no step so far has been long enough for
        self._kinds: set[tuple[bool, bool]] = set()
        self._captured_at = -1
        self._replay_at_capture = self._replay_elsewhere = False

    def covers(self, length: int, padded: bool, idle: bool) -> bool:
        """Whether steps like one at this length have agreed."""
        return (padded, idle) in self._kinds and not any(window <= length for window in self._windows)

    def note(self, length: int, padded: bool, idle: bool) -> None:
        """Notes that a step has agreed."""
        self._kinds.add((padded, idle))
        self._windows = [window for window in self._windows if window > length]

    def note_capture(self, length: int) -> None:
        """Notes that a step at this length was captured, of which no replay has been compared."""
        self._captured_at = length
        self._replay_at_capture = self._replay_elsewhere = False

    def covers_replay(self, length: int) -> bool:
        """Whether a replay at this length need not be compared with transformers' own step.

        What was a constant of the captured step shows in a replay at another length.
        """
        return self._replay_elsewhere or (length == self._captured_at and self._replay_at_capture)

    def note_replay(self, length: int) -> None:
        """Notes that a replay has agreed."""
        self._replay_at_capture = True
        self._replay_elsewhere = length != self._captured_at

    def steady(self, length: int, padded: bool, idle: bool) -> bool:
        """Whether a replay at any length needs no comparison, and the step neither."""
        return self._replay_elsewhere and self.covers(length, padded, idle)


@dataclass
class Abilities:
    """In which ways the steps of a graph can be computed, as far as was found out.

    Args:
        slots: on slot tensors; else as transformers does.
        capture: as replays of a graph.
        idle: with idle rows.
        compiled: the compiled forward of the model; None before it was tried, False where it cannot be compiled.
    """

    slots: bool = True
    capture: bool = False
    idle: bool = False
    compiled: Any = None


class DecodeGraph:
    """The decode steps of one model with so many rows, and the CUDA graph that they become.

    Args:
        context: appends and attends in these steps.
        runner: holds their inputs.
        call: the first of them.
        tested: the steps that agreed with transformers' own.
        capturable: whether the device has graphs.

    Attributes:
        can: in which ways steps can be computed.
        length: positions before the last step; -1 before the first.
        last_step: how the last step was computed: ``"eager"``, ``"replayed"``, or ``"speculative"``, a replay that had
            started before it was called for. ``"eager"`` too once something else was computed behind it.
    """

    def __init__(
        self, context: DecodeContext, runner: GraphRunner, call: StepCall, tested: TestedSteps, capturable: bool
    ) -> None:
        self.context, self.runner, self.tested = context, runner, tested
        self.model_state = ModelState(call.forward.model)
        self._moves = call.forward.moves
        self._following = [name for name, tensor in call.tensors.items() if tensor is None]  # follow from the length
        self.can = Abilities(capture=capturable)
        self.can.idle = capturable and runner.rows > 2 and self.obstacle() is None
        self.length = -1
        self._set_length = -1  # what inputs that follow from the length are set to
        self._output_type: type | None = None  # of the captured step
        self.last_step: Literal["eager", "replayed", "speculative"] = "eager"
        self._started = -1  # the length of a step that has begun before its call

    def is_of(self, forward: Forward, *, everything: bool) -> bool:
        """Whether the model computes by what it did, as far as can be said at once, or with ``everything`` in all."""
        return self._moves == forward.moves and self.model_state.is_of(forward.model, everything=everything)

    def follows_other_positions(self) -> bool:
        """Whether positions are not given, and those of the model do not count from 0 on."""
        return "position_ids" in self._following and self.model_state.shifts_positions()

    def obstacle(self) -> str | None:
        """What of the model a graph would leave out, or None."""
        if self.model_state.hooked():
            return "the model has forward hooks, which a replay does not call"
        if self.model_state.lacks_addresses():
            return "the model's weights have no address"
        return None

    def copies_experts(self) -> bool:
        """Whether experts are computed with a copy of their weights for each token, idle ones too."""
        configs = self.model_state.configs
        return any(getattr(config, "_experts_implementation", None) == "batched_mm" for config in configs)

    # Inputs.

    def prepare(self, call: StepCall) -> None:
        """Lets the rows be idle that a call does not have, and takes the padding of the others."""
        if call.batch != self.runner.live:
            self.runner.live = -1  # should this be interrupted
            self.context.rows.set_live(call.batch)
            self._set_length = -1
            self.runner.set_live(call.batch)
        stored = call.store.rows.format
        if self.context.rows.set_padding(stored.padding, stored.blank, call.length):
            self._set_length = -1

    def fill(self, call: StepCall) -> None:
        """Brings the inputs to what a call gives."""
        self.runner.fill(call.tensors)
        self.set_length(call.length)

    def set_length(self, length: int) -> None:
        """Brings the inputs that follow from the length to it."""
        if length != self._set_length:
            for name in self._following:
                self.runner.inputs[name].fill_(length)
            self.context.rows.set_length(length)
            self._set_length = length

    # Steps.

    def covers(self, length: int) -> bool:
        """Whether steps like the one at this length agreed with transformers' own."""
        return self.tested.covers(length, self.context.rows.padded, self.runner.idle)

    def steady(self, length: int) -> bool:
        """Whether a step at this length is a replay, and nothing of it is left to be compared."""
        captured, padded, idle = self.runner.captured, self.context.rows.padded, self.runner.idle
        return captured and self.tested.steady(length, padded, idle)

    def compute(self, call: StepCall, *, compiled: bool = False) -> Any:
        """What the model gives for a call, idle rows included.

        Raises:
            UnsupportedError: the step cannot be computed on slot tensors.
        """
        caches: dict[str, Any] = call.caches
        if compiled:
            caches = {name: PassthroughCache(call.store.windows) for name in call.caches}
        forward = self.can.compiled if compiled else call.forward.original
        with self.context.run(call.store, call.length, self.model_state.configs):
            output = forward(**call.others, **caches, **self.runner.inputs)
        if not isinstance(output, ModelOutput):
            raise UnsupportedError("its output is no ModelOutput")
        for name, value in output.items():
            if not isinstance(value, (torch.Tensor, Cache)):
                raise UnsupportedError(f"its output has {name}, which is no tensor")
            if self.can.idle and isinstance(value, torch.Tensor) and value.shape[:1] != (self.runner.rows,):
                raise UnsupportedError(f"its output has {name}, which is not of its rows")
        return output

    def run(self, call: StepCall) -> Any:
        """What the model gives for a call, computed without a graph."""
        output = self.compute(call)
        if not self.runner.idle:
            return output
        return type(output)(**{name: self.runner.live_output(value) for name, value in output.items()})

    def ignores_idle_rows(self, call: StepCall, output: torch.Tensor) -> bool:
        """Whether a step whose idle rows have other tokens gives the same ``output``."""
        idle = self.runner.inputs["input_ids"][self.runner.live :]
        idle.fill_(1)
        try:
            again = self.run(call)[0]
        finally:
            idle.zero_()
        return relative_error(again, output) <= 1e-3

    def capture(self, call: StepCall, pool: Any) -> None:
        """Captures the step that a call is."""
        run = functools.partial(self.compute, call, compiled=bool(self.can.compiled))
        output = self.runner.capture(run, pool, self.context.cache.device)
        self.tested.note_capture(call.length)
        self._output_type = type(output)
        self.runner.outputs = {n: v if isinstance(v, torch.Tensor) else None for n, v in output.items()}

    def step(self, call: StepCall) -> Any:
        """The output of a step that is steady: it has begun already, or is replayed."""
        if self.join_speculative(call):
            return self.output(call)
        self.fill(call)
        self.runner.replay()
        self.last_step = "replayed"
        output = self.output(call)
        self.set_length(call.length + 1)  # most likely the next one, which then need not wait for it
        return output

    def replay(self, call: StepCall) -> Any:
        """The output of a replay on the inputs as they are."""
        self.runner.replay()
        self.last_step = "replayed"
        return self.output(call)

    def output(self, call: StepCall) -> Any:
        """What the last replay left, for the caller to keep."""
        assert self._output_type is not None
        cache = next(iter(call.caches.values()))
        outputs = self.runner.copy_outputs()
        return self._output_type(**{name: cache if value is None else value for name, value in outputs.items()})

    def again(self) -> None:
        """Replays the last step."""
        self.set_length(self.length)
        self.runner.replay()

    # Steps that begin before their calls.

    def start_speculative(self, length: int, run: Greedy) -> None:
        """Replays the step at this length behind the last one, with the tokens of its highest logits.

        Args:
            length: positions before the step.
            run: the greedy ``generate`` that will most likely call for it.
        """
        ids = self.runner.live_input("input_ids")
        logits = self.runner.live_output(self.runner.outputs["logits"])[:, -1]
        with self.runner.speculating():
            if len(ids) > 1 and run.ends:
                ended = functools.reduce(torch.logical_or, (ids == end for end in {run.pad, *run.ends}))
                ids.copy_(torch.where(ended, run.pad, logits.argmax(-1, keepdim=True)))
            else:
                torch.argmax(logits, dim=-1, keepdim=True, out=ids)
            for name in ("position_ids", "cache_position"):
                if name in self.runner.inputs and name not in self._following:
                    self.runner.live_input(name).add_(1)
            self.set_length(length)
            self.runner.replay_speculatively()
        self._started = length

    @property
    def foretells_inputs(self) -> bool:
        """Whether the tokens and positions of the next step can be told from the outputs of this one."""
        logits = self.runner.outputs.get("logits")
        ids = self.runner.inputs["input_ids"]
        return logits is not None and logits.dim() == 3 and len(logits) == len(ids) and ids.dtype == torch.int64

    def join_speculative(self, call: StepCall) -> bool:
        """Waits for a step that has begun before its call, and returns whether it is the one that is called for."""
        store, length = call.store, call.length
        started = self._started == length and self.steady(length)
        right = started and self.runner.was_given(
            call.tensors
        )  # after an error ``store.cancel_speculative`` ends what has begun
        wait, store.speculative = store.speculative, None
        if wait is not None:
            wait()
        if started and (run := greedy(call.forward.model)):
            run.note(right)
        self.last_step = "speculative" if right else "eager"
        return right

    def wait(self) -> None:
        """Has the current stream wait for the step that has begun, which then is of no use."""
        self._started = -1
        self.last_step = "eager"
        self.runner.join_speculative()
