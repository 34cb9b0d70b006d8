"""``DecodeGraph``: decode steps of one model with a fixed number of rows, and the CUDA graph captured from them."""

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
    """Which kinds of steps agreed with those that transformers computed.

    Steps are of the same kind when rows are padded in both or in neither, rows are idle in both or in neither, and the
    same sliding windows are full. Replays also differ in whether they are at the length of the captured step.

    Args:
        windows: the sliding windows of the layers.
    """

    __test__ = False  # else pytest would collect the class as a test

    def __init__(self, windows: list[int]) -> None:
        self._windows = windows  # the windows that were full in no step that agreed
        self._kinds: set[tuple[bool, bool]] = set()
        self._captured_at = -1
        self._replay_at_capture = self._replay_elsewhere = False

    def covers(self, length: int, padded: bool, idle: bool) -> bool:
        """Returns whether a step of the same kind as one at this length has agreed."""
        return (padded, idle) in self._kinds and not any(window <= length for window in self._windows)

    def note(self, length: int, padded: bool, idle: bool) -> None:
        """Notes that a step has agreed."""
        self._kinds.add((padded, idle))
        self._windows = [window for window in self._windows if window > length]

    def note_capture(self, length: int) -> None:
        """Notes that a step at this length was captured, and that no replay of it was compared yet."""
        self._captured_at = length
        self._replay_at_capture = self._replay_elsewhere = False

    def covers_replay(self, length: int) -> bool:
        """Returns whether a replay at this length need not be compared with the step as transformers computes it.

        A replay at another length than that of the capture counts for all lengths: it would differ if the capture had
        recorded something that depends on the length as a constant.
        """
        return self._replay_elsewhere or (length == self._captured_at and self._replay_at_capture)

    def note_replay(self, length: int) -> None:
        """Notes that a replay at this length has agreed."""
        self._replay_at_capture = True
        self._replay_elsewhere = length != self._captured_at

    def steady(self, length: int, padded: bool, idle: bool) -> bool:
        """Returns whether neither replays at any length nor steps like one at this length need to be compared."""
        return self._replay_elsewhere and self.covers(length, padded, idle)


@dataclass
class Abilities:
    """In which ways the steps of a graph can be computed, as far as is known.

    Args:
        slots: on slot tensors; otherwise only transformers computes them.
        capture: as replays of a CUDA graph.
        idle: with idle rows.
        compiled: the compiled forward of the model; None before that was tried, False where steps are not compiled.
    """

    slots: bool = True
    capture: bool = False
    idle: bool = False
    compiled: Any = None


class DecodeGraph:
    """Decode steps of one model with a fixed number of rows, and the CUDA graph captured from them.

    Args:
        context: appends and attends in these steps.
        runner: holds their inputs.
        call: the first of these steps.
        tested: the kinds of steps that agreed with those of transformers.
        capturable: whether the device supports CUDA graphs.

    Attributes:
        model_state: what the model computed by when this object was made.
        can: in which ways steps can be computed.
        length: positions before the last step; -1 before the first, -2 after ``DecodeGraphs.interrupt``.
        last_step: how the last step was computed: ``"eager"``, ``"replayed"``, or ``"speculative"``, which is a replay
            that was started before the step was called for. Also ``"eager"`` once a later step has been computed in
            another way, or cancelled.
    """

    def __init__(
        self, context: DecodeContext, runner: GraphRunner, call: StepCall, tested: TestedSteps, capturable: bool
    ) -> None:
        self.context, self.runner, self.tested = context, runner, tested
        self.model_state = ModelState(call.forward.model)
        self._moves = call.forward.moves
        self._following = [name for name, tensor in call.tensors.items() if tensor is None]  # set from the length
        self.can = Abilities(capture=capturable)
        self.can.idle = capturable and runner.rows > 2 and self.obstacle() is None
        self.length = -1
        self._set_length = -1  # the length that the inputs in ``_following`` are set for; -1 where that is not known
        self._output_type: type | None = None  # of the captured step
        self.last_step: Literal["eager", "replayed", "speculative"] = "eager"
        self._started = -1  # the length of the speculative step that was started; -1 where none was

    def is_of(self, forward: Forward, *, everything: bool) -> bool:
        """Returns whether ``forward`` is of the same model, in the state in which this object was made.

        Args:
            forward: of a model.
            everything: whether to compare all that the model computes by, and not only what is compared quickly.
        """
        return self._moves == forward.moves and self.model_state.is_of(forward.model, everything=everything)

    def follows_other_positions(self) -> bool:
        """Returns whether the call gives no positions and the model does not count them from 0."""
        return "position_ids" in self._following and self.model_state.shifts_positions()

    def obstacle(self) -> str | None:
        """Returns why the model cannot be captured, or None."""
        if self.model_state.hooked():
            return "the model has forward hooks, which a replay does not call"
        if self.model_state.lacks_addresses():
            return "the model's weights have no address"
        return None

    def copies_experts(self) -> bool:
        """Returns whether the model copies the weights of experts for each token, those of idle rows included."""
        configs = self.model_state.configs
        return any(getattr(config, "_experts_implementation", None) == "batched_mm" for config in configs)

    # Inputs.

    def prepare(self, call: StepCall) -> None:
        """Makes rows idle that the batch of a call does not have, and takes over the padding of the others."""
        if call.batch != self.runner.live:
            self.runner.live = -1  # remains where an interrupt ends this early, so that it is done again
            self.context.rows.set_live(call.batch)
            self._set_length = -1
            self.runner.set_live(call.batch)
        stored = call.store.rows.format
        if self.context.rows.set_padding(stored.padding, stored.blank, call.length):
            self._set_length = -1

    def fill(self, call: StepCall) -> None:
        """Sets all inputs to those of a call."""
        self.runner.fill(call.tensors)
        self.set_length(call.length)

    def set_length(self, length: int) -> None:
        """Sets the inputs that depend on the length alone."""
        if length != self._set_length:
            for name in self._following:
                self.runner.inputs[name].fill_(length)
            self.context.rows.set_length(length)
            self._set_length = length

    # Steps.

    def covers(self, length: int) -> bool:
        """Returns whether a step of the same kind as the next one at this length agreed with that of transformers."""
        return self.tested.covers(length, self.context.rows.padded, self.runner.idle)

    def steady(self, length: int) -> bool:
        """Returns whether a step at this length is a replay of which nothing is left to compare."""
        captured, padded, idle = self.runner.captured, self.context.rows.padded, self.runner.idle
        return captured and self.tested.steady(length, padded, idle)

    def compute(self, call: StepCall, *, compiled: bool = False) -> Any:
        """Computes a step by the model's forward on slot tensors.

        Args:
            call: the step.
            compiled: uses the compiled forward.

        Returns:
            The output of the model, idle rows included.

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
        """Computes a step without a graph, and returns the output of the model without idle rows."""
        output = self.compute(call)
        if not self.runner.idle:
            return output
        return type(output)(**{name: self.runner.live_output(value) for name, value in output.items()})

    def ignores_idle_rows(self, call: StepCall, output: torch.Tensor) -> bool:
        """Returns whether the step gives the same ``output`` with other tokens in its idle rows."""
        idle = self.runner.inputs["input_ids"][self.runner.live :]
        idle.fill_(1)
        try:
            again = self.run(call)[0]
        finally:
            idle.zero_()
        return relative_error(again, output) <= 1e-3

    def capture(self, call: StepCall, pool: Any) -> None:
        """Captures a step, which takes memory from the graph pool ``pool``."""
        run = functools.partial(self.compute, call, compiled=bool(self.can.compiled))
        output = self.runner.capture(run, pool, self.context.cache.device)
        self.tested.note_capture(call.length)
        self._output_type = type(output)
        self.runner.outputs = {n: v if isinstance(v, torch.Tensor) else None for n, v in output.items()}

    def step(self, call: StepCall) -> Any:
        """Returns the output of a step that is steady: of the speculative step if it fits, else of a replay."""
        if self.join_speculative(call):
            return self.output(call)
        self.fill(call)
        self.runner.replay()
        self.last_step = "replayed"
        output = self.output(call)
        self.set_length(call.length + 1)  # most likely the next length, so that the next call need not set it
        return output

    def replay(self, call: StepCall) -> Any:
        """Replays the graph on the inputs as they are, and returns the output."""
        self.runner.replay()
        self.last_step = "replayed"
        return self.output(call)

    def output(self, call: StepCall) -> Any:
        """Returns a copy of the output of the last replay."""
        assert self._output_type is not None
        cache = next(iter(call.caches.values()))
        outputs = self.runner.copy_outputs()
        return self._output_type(**{name: cache if value is None else value for name, value in outputs.items()})

    def again(self) -> None:
        """Replays the last step, e.g. to measure its time."""
        self.set_length(self.length)
        self.runner.replay()

    # Speculative steps.

    def start_speculative(self, length: int, run: Greedy) -> None:
        """Starts the next step speculatively: a replay with the tokens that have the highest logits in the last step.

        Args:
            length: positions before the step.
            run: the greedy ``generate`` that will most likely call for the step.
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
        """Whether the tokens and positions of the next step can be computed from the outputs of the last one."""
        logits = self.runner.outputs.get("logits")
        ids = self.runner.inputs["input_ids"]
        return logits is not None and logits.dim() == 3 and len(logits) == len(ids) and ids.dtype == torch.int64

    def join_speculative(self, call: StepCall) -> bool:
        """Ends the speculative step, if one runs, and returns whether it is the step that ``call`` is.

        The current stream then waits for it on the device. ``call`` needs no replay where it is the step.
        """
        store, length = call.store, call.length
        started = self._started == length and self.steady(length)
        right = started and self.runner.was_given(
            call.tensors
        )  # where this raises, ``store.speculative`` is still set, and ``cancel_speculative`` ends the step
        wait, store.speculative = store.speculative, None
        if wait is not None:
            wait()
        if started and (run := greedy(call.forward.model)):
            run.note(right)
        self.last_step = "speculative" if right else "eager"
        return right

    def wait(self) -> None:
        """Makes the current stream wait for the speculative step, and forgets that the step was started."""
        self._started = -1
        self.last_step = "eager"
        self.runner.join_speculative()
