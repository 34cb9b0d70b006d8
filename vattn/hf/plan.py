"""``DecodeGraph``: steps of so many rows and one set of arguments, their inputs and their graph; ``Call``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from vattn.graphs.capture import capturable
from vattn.hf.attach import CACHE_KEYWORDS, Forward, Greedy
from vattn.hf.step import DecodeContext
from vattn.hf.store import Store
from vattn.hf.verify import relative_error
from vattn.models.attention import PassthroughCache, UnsupportedError
from vattn.models.state import ModelState


@dataclass
class Call:
    """A model's call as a decode step: its ids, its mask, the tensors and what else it was given."""

    forward: Forward
    store: Store
    ids: torch.Tensor  # [batch, 1]
    mask: torch.Tensor | None  # [batch, length + 1]
    tensors: dict[str, torch.Tensor | None]  # None: to be made up
    caches: dict[str, Any]  # by keyword
    others: dict[str, Any]
    given: dict[str, Any]
    unknown: str | None = None  # an argument that is not known to be the same in every step
    length: int = -1  # of the sequences before it

    @property
    def batch(self) -> int:
        return len(self.ids)

    @property
    def rounded(self) -> bool:
        return self.store.options.scales is not None

    def bucket(self) -> int:
        """Rows of a graph for this batch: 1, 2, 4, 8 or a multiple of 8; just its own where they cannot be more."""
        if any(tensor is not None and tensor.dim() > 2 for tensor in self.tensors.values()):
            return self.batch
        return 1 << (self.batch - 1).bit_length() if self.batch <= 8 else -(-self.batch // 8) * 8

    def key(self, rows: int) -> Any:
        """What a plan with so many rows is for."""
        shapes = tuple((n, None if t is None else (self.shape(t, rows), t.dtype)) for n, t in self.tensors.items())
        return shapes, tuple(self.caches), tuple(sorted(self.others.items()))

    def shape(self, tensor: torch.Tensor, rows: int) -> tuple[int, ...]:
        """Of one of the arguments, in a plan with so many rows."""
        return (rows, *tensor.shape[1:]) if self.by_rows(tensor) else tuple(tensor.shape)

    def by_rows(self, tensor: torch.Tensor) -> bool:
        """Whether an argument has something for each row, rather than the same for all."""
        return tensor.dim() == 2 and len(tensor) == self.batch

    @classmethod
    def of(cls, forward: Forward, store: Store, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """None where it is none."""
        parameters = forward.parameters
        given = dict(kwargs)
        if args:
            if len(args) > 1 or "input_ids" in kwargs or parameters[:1] != ("input_ids",):
                return None
            given["input_ids"] = args[0]
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or "position_ids" not in parameters:
            return None
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            return None
        tensors: dict[str, torch.Tensor | None] = {"input_ids": ids, "position_ids": None}
        if "cache_position" in parameters:
            tensors["cache_position"] = None
        caches, others, unknown = {}, {}, None
        for name, value in given.items():
            if name in ("input_ids", "attention_mask") or value is None:
                continue
            if name in ("position_ids", "cache_position") and isinstance(value, torch.Tensor):
                tensors[name] = value
            elif name in CACHE_KEYWORDS:
                caches[name] = value
            elif name != "labels" and isinstance(value, torch.Tensor) and value.shape == ids.shape:
                tensors[name] = value  # e.g. the kinds of tokens
            elif isinstance(value, (bool, int, float, str)):
                others[name] = value
            else:
                unknown = name
        if others.get("output_attentions") or others.get("output_hidden_states") or others.get("return_dict") is False:
            return None
        return cls(forward, store, ids, mask, tensors, caches, others, given, unknown)


class DecodeGraph:
    """The steps of so many rows: what they are given in place, and their graph once there is one.

    Args:
        step: of them.
        call: the first one.
        rows: of what is computed; those that a call has not are idle.
        windows: of the layers, without None.
        stream: where captures are made.
        ahead: where steps begin before their calls.
    """

    def __init__(
        self,
        step: DecodeContext,
        call: Call,
        rows: int,
        windows: list[int],
        stream: torch.cuda.Stream | None,
        ahead: torch.cuda.Stream | None,
    ) -> None:
        self.step = step
        self.length = -1  # at the last step
        model = call.forward.model
        self.model_state = ModelState(model)
        self._moves = call.forward.moves
        self.rows = rows
        device = call.ids.device
        shapes = {"position_ids": (rows, 1), "cache_position": (1,)}
        with torch.inference_mode(False):
            self._tensors = {
                name: torch.zeros(shapes[name], dtype=torch.int64, device=device)
                if tensor is None
                else torch.zeros(call.shape(tensor, rows), dtype=tensor.dtype, device=tensor.device)
                for name, tensor in call.tensors.items()
            }
        self._made_up = [name for name, tensor in call.tensors.items() if tensor is None]
        self._live = -1
        self._set_length = -1
        self.refused = False
        self._tested: set[tuple[bool, bool]] = set()  # steps with padding, idle rows or without, as transformers' were
        self._windows = windows  # that no step so far has been long enough for
        self.first_tested = False  # the first replay, at the length that was captured
        self.replays_tested = False  # one at another length
        self.replayed = False  # the last step, which nothing has been computed behind
        self.early = False  # the last step, before its call
        self.compiled: Any = None  # the model's forward; False when it is not
        self.graph: Any = None
        self.graph_bytes = 0
        self.captured_at = -1
        self.captured: tuple[type, dict[str, Any]] | None = None  # the class of the output and its fields
        self.stream = stream
        self.begun = -1  # the length of a step that has begun before its call
        self._ahead = ahead
        if ahead is not None:
            self._guessed, self._done = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]
        self.capturable = capturable(device)
        self.spare = self.capturable and rows > 2 and self.obstacle() is None  # whether rows may be idle

    def is_of(self, forward: Forward, *, everything: bool) -> bool:
        """Whether the model is the one, as far as can be said at once, or with ``everything`` in all it computes by."""
        return self._moves == forward.moves and self.model_state.is_of(forward.model, everything=everything)

    def makes_up_positions(self) -> bool:
        """Whether the positions that a call has not given are others than how many come before."""
        made_up = "position_ids" in self._made_up
        return made_up and self.model_state.shifts_positions()

    def obstacle(self) -> str | None:
        """What of the model a graph would leave out."""
        if self.model_state.hooked():
            return "the model has forward hooks, which a replay does not call"
        if self.model_state.lacks_addresses():
            return "the model's weights have no address"
        return None

    def tested(self, length: int) -> bool:
        """Whether steps like one at this length have agreed with transformers'."""
        return (self.step.padded, self.idle) in self._tested and not any(window <= length for window in self._windows)

    def note_tested(self, length: int) -> None:
        self._tested.add((self.step.padded, self.idle))
        self._windows = [window for window in self._windows if window > length]

    def note_captured(self, graph: Any, output: Any, length: int) -> None:
        self.graph, self.captured_at, self.replays_tested = graph, length, False
        self.first_tested = False
        self.captured = type(output), {n: v if isinstance(v, torch.Tensor) else None for n, v in output.items()}

    def fill(self, call: Call) -> None:
        given = self._given(call)
        torch._foreach_copy_([mine for mine, _ in given], [theirs for _, theirs in given], non_blocking=True)
        self.set_length(call.length)

    def set_live(self, call: Call) -> None:
        """Lets the rows be idle that a call has not: nothing of an earlier one is left in them."""
        if call.batch == self._live:
            return
        self._live = -1
        self._mine = dict(self._tensors)
        with torch.inference_mode(False):
            for name, given in call.tensors.items():
                if given is not None and call.by_rows(given):
                    self._mine[name], idle = self._tensors[name].tensor_split([call.batch])
                    idle.zero_()
        self.step.set_live(call.batch)
        self._set_length = -1
        self._live = call.batch

    @property
    def idle(self) -> bool:
        return self._live < self.rows

    def copies_experts(self) -> bool:
        """Whether experts are computed with a copy of their weights for each token, idle ones too."""
        configs = self.model_state.configs
        return any(getattr(config, "_experts_implementation", None) == "batched_mm" for config in configs)

    def sees_live_rows_alone(self, call: Call, output: torch.Tensor) -> bool:
        """Whether a step whose idle rows have other tokens gives the same."""
        idle = self._tensors["input_ids"][self._live :]
        idle.fill_(1)
        try:
            again = self.run(call)[0]
        finally:
            idle.zero_()
        return relative_error(again, output) <= 1e-3

    def set_padding(self, store: Store, length: int) -> None:
        if self.step.set_padding(store.rows.format.padding, store.rows.format.blank, length):
            self._set_length = -1

    def set_length(self, length: int) -> None:
        """Brings what is made up of the length to it."""
        if length != self._set_length:
            for name in self._made_up:
                self._tensors[name].fill_(length)
            self.step.set_length(length)
            self._set_length = length

    def run(self, call: Call) -> Any:
        """What the model gives for a call."""
        output = self.compute(call)
        return type(output)(**{n: self._seen(v) for n, v in output.items()}) if self.idle else output

    def compute(self, call: Call, *, compiled: bool = False) -> Any:
        """What the model gives for a call, idle rows included."""
        caches = {name: PassthroughCache(call.store.windows) for name in call.caches} if compiled else call.caches
        with self.step.run(call.store, call.length, self.model_state.configs):
            output = (self.compiled if compiled else call.forward.original)(**call.others, **caches, **self._tensors)
        if not isinstance(output, ModelOutput):
            raise UnsupportedError("its output is no ModelOutput")
        for name, value in output.items():
            if not isinstance(value, (torch.Tensor, Cache)):
                raise UnsupportedError(f"its output has {name}, which is no tensor")
            if self.spare and isinstance(value, torch.Tensor) and value.shape[:1] != (self.rows,):
                raise UnsupportedError(f"its output has {name}, which is not of its rows")
        return output

    def steady(self, length: int) -> bool:
        """Whether a step at this length is a replay, and nothing of it is left to be tested."""
        return self.graph is not None and self.replays_tested and self.tested(length)

    def replay(self) -> None:
        self.graph.replay()
        self.replayed = True

    def output(self, call: Call) -> Any:
        """Of the last replay, for the caller to keep."""
        assert self.captured is not None
        kind, fields = self.captured
        cache = next(iter(call.caches.values()))
        return kind(**{name: cache if value is None else self._seen(value).clone() for name, value in fields.items()})

    def _seen(self, value: Any) -> Any:
        """Without idle rows."""
        return value[: self._live] if isinstance(value, torch.Tensor) and self.idle else value

    def again(self) -> None:
        self.set_length(self.length)
        self.graph.replay()

    @property
    def guesses(self) -> bool:
        """Whether the tokens and positions of the next step can be told from this one's."""
        logits = self.captured and self.captured[1].get("logits")
        ids = self._tensors["input_ids"]
        return logits is not None and logits.dim() == 3 and len(logits) == len(ids) and ids.dtype == torch.int64

    def begin(self, length: int, run: Greedy) -> None:
        """Replays the step at this length behind the one before, with the tokens of its highest logits."""
        assert self.captured is not None
        ids, logits = self._mine["input_ids"], self._seen(self.captured[1]["logits"])[:, -1]
        with self._ahead_of_call():
            if len(ids) > 1 and run.ends:
                ended = functools.reduce(torch.logical_or, (ids == end for end in {run.pad, *run.ends}))
                ids.copy_(torch.where(ended, run.pad, logits.argmax(-1, keepdim=True)))
            else:
                torch.argmax(logits, dim=-1, keepdim=True, out=ids)
            for name, tensor in self._mine.items():
                if name in ("position_ids", "cache_position") and name not in self._made_up:
                    tensor.add_(1)
            self.set_length(length)
            if self._ahead is not None:
                self._guessed.record()
            self.graph.replay()
        self.begun = length

    @contextlib.contextmanager
    def _ahead_of_call(self) -> Iterator[None]:
        """On a stream where what the caller does with the last step is not waited for."""
        if self._ahead is None:
            yield
            return
        self._ahead.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._ahead):
            try:
                yield
            finally:
                self._done.record()

    def fits(self, call: Call) -> bool:
        """Whether the step that has begun is the one that is called for."""
        if self._ahead is not None:
            torch.cuda.current_stream().wait_event(self._guessed)
        return all(torch.equal(mine, theirs) for mine, theirs in self._given(call))

    def _given(self, call: Call) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the graph reads and what a call gives for it."""
        return [(self._mine[name], tensor) for name, tensor in call.tensors.items() if tensor is not None]

    def wait(self) -> None:
        """What the stream does from now on comes behind the step that has begun."""
        self.begun = -1
        self.replayed = False
        if self._ahead is not None:
            torch.cuda.current_stream(self._ahead.device).wait_event(self._done)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """On a stream of its own, as a capture is: libraries set themselves up there."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            torch.cuda.current_stream().wait_stream(self.stream)


def tokens_of(given: dict[str, Any]) -> Any:
    """The tokens of a model's call, ``[batch, n, ...]``, or None."""
    found = (given.get(name) for name in ("input_ids", "inputs_embeds"))
    return next((t for t in found if isinstance(t, torch.Tensor) and t.dim() >= 2), None)
