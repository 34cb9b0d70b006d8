"""``Decoder``: which calls of a model are decode steps, whether they are trusted, and their capture into CUDA graphs.

A step appends one position to every sequence of a ``VirtualCache`` and attends by a stock kernel, with the lengths in
device memory. So it can be captured once and replayed while the sequences grow. Calls that are anything else run as
they do without it: prompts, several tokens at once, unusual arguments. The first step is computed both ways, and a
model whose own result is another one keeps running the old way; what cannot be captured runs step by step.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vattn import kernels
from vattn.arguments import flag, shown
from vattn.errors import Error
from vattn.graphs import compilation
from vattn.graphs.capture import capturable, record, streams
from vattn.hf.attach import Forward, deciding, greedy
from vattn.hf.padding import hidden
from vattn.hf.plan import Call, DecodeGraph, tokens_of
from vattn.hf.prefill import Prompt
from vattn.hf.step import DecodeContext
from vattn.hf.store import Store
from vattn.hf.verify import Expected, PromptWatch, Watch
from vattn.kernels.append import takes_idle
from vattn.memory.kv_cache import KVCache
from vattn.models.attention import UnsupportedError
from vattn.models.state import configs_of, state_of

_LOG = logging.getLogger("vattn")
_MOST_GRAPHS = 8  # of one cache


@dataclass(frozen=True)
class DecodeStats:
    """How the decode steps of a ``VirtualCache`` ran.

    Args:
        replayed: steps that were replays of a graph.
        eager: steps on slot tensors that were not, among them those that transformers computed too, to compare.
        ahead: of the replayed ones, those that had begun before they were called for.
        prompts: calls with several tokens for each row whose attention was a kernel's of vattn.
        captures: graphs captured so far.
        graphs: graphs kept, at most 8: the least recently used goes first. Each is for batches up to a size.
        graph_bytes: device memory that capturing them took.
        kernel: the attention kernels that steps use, by name.
        fallback: the last reason why a step ran without vattn's attention, or without a graph; None where all did.
    """

    replayed: int
    eager: int
    ahead: int
    prompts: int
    captures: int
    graphs: int
    graph_bytes: int
    kernel: str | None
    fallback: str | None


class Decoder:
    """The decode steps of one ``VirtualCache``."""

    def __init__(
        self,
        attention: str | None,
        capture: bool,
        compiled: bool | dict[str, Any] = False,
        run_ahead: bool = True,
    ) -> None:
        self._named = attention
        self._attention = "auto" if attention is None else attention
        kernels.named(self._attention)
        flag("capture", capture)
        flag("run_ahead", run_ahead)
        if not isinstance(compiled, (bool, dict)):
            raise TypeError(f"compiled must be True, False or torch.compile's options, not {shown(compiled)}")
        if compiled and not capture:
            raise ValueError("compiled steps are captured: leave capture as it is")
        self._compiled = compiled
        self._run_ahead = run_ahead
        self.capture = capture
        self.enabled = True
        self._plans: OrderedDict[Any, DecodeGraph] = OrderedDict()
        self._pool: Any = None
        self._ahead: torch.cuda.Stream | None = None  # where steps begin before their calls
        self._fallback: str | None = None
        self._counts = {"replayed": 0, "eager": 0, "ahead": 0, "prompts": 0, "captures": 0}
        self._kernels: dict[str, None] = {}
        self._slower: set[tuple[int, str]] = set()  # models and kinds of prompts that no kernel is faster for

    def kernels(self) -> tuple[kernels.Kernel, ...]:
        """Those that steps may come to use."""
        auto = self._attention == "auto"
        return tuple(kernel for kernel in kernels.named(self._attention) if not (auto and kernel.missing()))

    def stats(self) -> DecodeStats:
        return DecodeStats(
            **self._counts,
            graphs=sum(plan.graph is not None for plan in self._plans.values()),
            graph_bytes=sum(plan.graph_bytes for plan in self._plans.values()),
            kernel=", ".join(self._kernels) or None,
            fallback=self._fallback,
        )

    def again(self) -> Callable[[], None] | None:
        """Replays the last step, where it was a replay and its sequences have not changed, e.g. to be timed."""
        plan = next(reversed(self._plans.values()), None)
        there = plan is not None and plan.replayed and plan.model_state.model() is not None
        return plan.again if plan is not None and there else None

    def interrupt(self) -> None:
        """The next step is none that follows the last."""
        for plan in self._plans.values():
            plan.length = -2

    def clear(self) -> None:
        """Lets the graphs and their memory go."""
        self._plans.clear()
        self._pool = None

    def clone(self) -> Decoder:
        """One of the same settings, for another cache."""
        return Decoder(self._named, self.capture, self._compiled, self._run_ahead)

    def takes(self, forward: Forward, device: torch.device) -> bool:
        """Whether steps of a model on a device are computed on slot tensors, as far as can be said before one."""
        if not self.enabled or torch.is_grad_enabled() or forward.model.training:
            return False
        config = getattr(forward.model, "config", None)
        if getattr(config, "output_attentions", False) or getattr(config, "output_hidden_states", False):
            return False
        if forward.refused:
            self._fallback = forward.refused
            return False
        # Where nothing is to be captured transformers' own way is as good. Autocast keeps copies of weights for as long
        # as it lasts: they are no part of a step.
        return (self._named is not None or device.type == "cuda") and not torch.is_autocast_enabled(device.type)

    def step(self, store: Store, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a decode step, or None: then it is no such step, and nothing has changed."""
        call = Call.of(forward, store, args, kwargs)
        if call is None or not self.takes(forward, call.ids.device):
            return None
        if call.unknown is not None:
            self._fall_back(f"decodes as transformers does: a step is given {call.unknown}")
            return None
        return self._step(call)

    def prompt(self, store: Store, forward: Forward, given: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """The output of a call with several tokens for each row, on kernels; or None, and nothing has changed.

        Args:
            store: of the cache.
            forward: of the model, which takes steps.
            given: its arguments by name, ``input_ids`` or ``inputs_embeds`` among them.
            compute: the call of the model itself.
        """
        tokens, mask, lengths = tokens_of(given), given.get("attention_mask"), list(store.lengths)
        (batch, n), start = tokens.shape[:2], lengths[0] if lengths else 0
        if n < 2 or len(set(lengths)) != 1 or given.get("labels") is not None:
            return None
        if given.get("output_attentions") or given.get("return_dict") is False:
            return None
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != (batch, start + n)):
            return None
        configs = configs_of(forward.model)
        if forward.trusted is None or forward.prompts is False or forward.trusted != _attends_by(forward, configs):
            return None
        if (hides := [0] * batch if mask is None else hidden(mask)) is None:
            return None
        prompt = Prompt(hides, start, n, store.windows, self._attention)
        if (id(forward), prompt.kind) in self._slower:
            return None
        token = deciding.set(True)
        try:
            return self._prompt(prompt, configs, store, forward, compute)
        except UnsupportedError as reason:
            _LOG.debug("a prompt runs as transformers runs it: %s", reason)
            if reason.of_model:
                forward.prompts = False
            if prompt.slower:
                self._slower.add((id(forward), prompt.kind))
            store.lengths[:] = lengths
            return None
        finally:
            deciding.reset(token)

    def _prompt(
        self, prompt: Prompt, configs: list[Any], store: Store, forward: Forward, compute: Callable[[], Any]
    ) -> Any:
        """The first of its kind that a model computes is computed by transformers too, whose result is the one."""
        lengths = list(store.lengths)
        kind = prompt.kind, self._attention, prompt.binding_windows
        verified = kind in forward.prompt_kinds
        if not verified:
            prompt.watch = PromptWatch(prompt.hidden, prompt.start, prompt.n, store.windows)
        try:
            with prompt.run(configs):
                ours = compute()
        except UnsupportedError:
            raise
        except Exception as error:
            if verified:
                raise
            ours_alone = not isinstance(error, (Error, torch.OutOfMemoryError))
            raise UnsupportedError(f"{type(error).__name__}: {error}", of_model=ours_alone) from error
        if (watch := prompt.watch) is not None:
            last = ours[0][:, -1:].clone()
            del ours

            def again() -> Any:
                store.lengths[:] = list(lengths)
                store.ready.clear()
                return compute()

            expected = Expected(again, configs, watch.spread, rounded=store.options.scales is not None)
            if expected.tells() and (reason := watch.fault or expected.difference(last)):
                forward.prompts = False
                _LOG.warning("prompts run as transformers runs them: kernels give something else (%s)", reason)
                return expected.output()
            if expected.tells():
                forward.prompts = True
                forward.prompt_kinds.add(kind)
            ours = expected.output()
        self._counts["prompts"] += 1
        return ours

    def _step(self, call: Call) -> Any:
        store, forward = call.store, call.forward
        grown = store.grow_for_step(call.ids.shape[0], call.ids.device)
        if grown is None:
            return None
        cache, base, call.length = grown
        output = None
        on_device = call.ids.is_cuda
        with torch.cuda.device(call.ids.device) if on_device else contextlib.nullcontext(), forward.step():
            token = deciding.set(True)  # what is called meanwhile is the model itself
            try:
                plan, output = self._attempt(call, cache, base)
                if output is not None and plan.replayed and not plan.model_state.stayed():
                    output = None
                    self._plans = OrderedDict((key, other) for key, other in self._plans.items() if other is not plan)
                    self.interrupt()
                    plan, output = self._attempt(call, cache, base)
            finally:
                deciding.reset(token)
                store.lengths[:] = [call.length + (output is not None)] * len(store.lengths)
            if output is not None:
                self._begin(plan, call)
        if output is not None and not forward.refused:
            self._counts["replayed" if plan.replayed else "eager"] += 1
            self._counts["ahead"] += plan.early
        return output

    def _attempt(self, call: Call, cache: KVCache, base: int) -> tuple[DecodeGraph, Any]:
        """The plan of a step, and its output, or None."""
        while True:
            plan = self._plan(call, cache, base)
            spare = plan.spare
            output = self._try(plan, call)
            if output is not None or plan.spare == spare:  # else it was found that no rows may be idle
                return plan, output

    def _plan(self, call: Call, cache: KVCache, base: int) -> DecodeGraph:
        """One with rows to spare, or where none may be idle with just those of the batch."""
        for key in [key for key, plan in self._plans.items() if plan.step.cache is not cache]:
            del self._plans[key]  # it was built anew
        device = call.ids.device
        spare = self.capture and capturable(device) and takes_idle(device)
        plan = self._plan_of(call, cache, base, min(call.bucket(), cache.slots - base) if spare else call.batch)
        if plan.rows > call.batch and (not plan.spare or plan.copies_experts()):
            plan = self._plan_of(call, cache, base, call.batch)
            plan.spare = False
        plan.set_live(call)
        plan.set_padding(call.store, call.length)
        return plan

    def _plan_of(self, call: Call, cache: KVCache, base: int, rows: int) -> DecodeGraph:
        forward, store, length = call.forward, call.store, call.length
        key = (id(forward.model), base, call.key(rows))
        plan = self._plans.get(key)
        if plan is not None and not plan.is_of(forward, everything=length != plan.length + 1):
            plan = None
        if plan is None:
            windows = sorted({window for window in store.windows if window is not None})
            stream, side = streams(call.ids.device) if call.ids.is_cuda else (None, None)
            if call.ids.is_cuda and self._ahead is None:
                self._ahead = torch.cuda.Stream(call.ids.device)  # type: ignore[no-untyped-call]
            if self._compiled:
                self._lay_side_by_side(forward)
            step = DecodeContext(cache, base, rows, self._attention, self.capture, side)
            plan = self._plans[key] = DecodeGraph(step, call, rows, windows, stream, self._ahead)
            while len(self._plans) > 2 * _MOST_GRAPHS:  # those where no rows may be idle may have none
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        plan.length = length
        return plan

    def _lay_side_by_side(self, forward: Forward) -> None:
        try:
            forward.move(compilation.lay_side_by_side)
        except torch.OutOfMemoryError:
            forward.moves += 1  # some may lie elsewhere
            self._fall_back("weights stay where they are: there is no memory to lay them side by side")

    def _try(self, plan: DecodeGraph, call: Call) -> Any:
        if plan.refused:
            return None
        if plan.makes_up_positions():
            self._fall_back("positions are not given, and the model's are not how many come before (rope_deltas)")
            return None
        step, length = plan.step, call.length
        step.mark()
        # Once the steps are replays the mask is looked at beside them.
        steady = plan.steady(length)
        fits = not steady and step.starts_fit(call.mask, length)
        if steady or fits:
            output = self._run(plan, call)
            if fits or output is None or step.starts_fit(call.mask, length):
                return output
        call.store.rows.require_hidden(call.mask)
        if not step.set_starts(call.mask, length):
            self._fall_back("the attention mask is no left padding")
            return None
        return self._run(plan, call)

    def _run(self, plan: DecodeGraph, call: Call) -> Any:
        if self._has_begun(plan, call):
            return plan.output(call)
        plan.fill(call)
        if plan.steady(call.length):
            plan.replay()
            output = plan.output(call)
            plan.set_length(call.length + 1)  # most likely the next, which then need not wait for it
            return output
        if not (self.capture and plan.capturable):
            return self._run_anew(plan, call)
        with call.forward.alone() as alone:
            # What other threads compute while a graph is captured could end the capture.
            return self._run_anew(plan, call) if alone else None

    def _begin(self, plan: DecodeGraph, call: Call) -> None:
        """Replays the step behind a call with the most likely tokens, where they are most likely the next ones."""
        store, length = call.store, call.length + 1
        run = greedy(call.forward.model) if self._run_ahead else None
        if run is None or not run.goes_on(store) or not plan.replayed or not plan.steady(length):
            return
        if plan.guesses and store.rows.grow_ahead(length):
            store.ahead = plan.wait
            plan.begin(length, run)

    def _has_begun(self, plan: DecodeGraph, call: Call) -> bool:
        """Whether this step runs already, on what it is called with; waits for what runs."""
        store, length = call.store, call.length
        begun = plan.begun == length and plan.steady(length)
        right = begun and plan.fits(call)  # an error here leaves what has begun to who lands it
        wait, store.ahead = store.ahead, None
        if wait is not None:
            wait()
        if begun and (run := greedy(call.forward.model)):
            run.note(right)
        plan.replayed = plan.early = right
        return right

    def _run_anew(self, plan: DecodeGraph, call: Call) -> Any:
        """A step that is no plain replay: compared, captured, or eager."""
        try:
            if not plan.tested(call.length):
                return self._compare(plan, call)
            if self.capture and plan.capturable and plan.graph is None:
                self._capture(plan, call)
            if plan.graph is None:
                return plan.run(call)
            plan.replay()
            output = plan.output(call)
            # What was a constant of the step that was captured shows in one that is longer.
            if call.length == plan.captured_at and plan.first_tested:
                return output
            return self._compare(plan, call, output)
        except UnsupportedError as reason:
            if plan.spare:
                plan.spare = False
            elif reason.of_model:
                self._refuse(call.forward, str(reason))
            else:
                plan.refused = True
                self._fall_back(f"decodes as transformers does: {reason}")
            return None

    def _compare(self, plan: DecodeGraph, call: Call, replayed: Any = None) -> Any:
        """A step that transformers computes too, whose result is the one; a replay of it is compared as well."""
        step, store = plan.step, call.store
        step.watch = watch = Watch(store, call.mask, call.length, call.batch)
        try:
            with plan.beside():
                ours = plan.run(call)
                seen_alone = not plan.idle or replayed is not None or plan.sees_live_rows_alone(call, ours[0])
        except (UnsupportedError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedError(f"{type(error).__name__}: {error}") from error
        finally:
            step.watch = None

        def compute() -> Any:
            store.lengths[:] = [call.length] * len(store.lengths)
            store.ready.clear()
            return call.forward.original(**call.given)

        expected = Expected(compute, plan.model_state.configs, watch.spread, rounded=call.rounded)
        if not expected.tells():
            return expected.output()
        if not seen_alone:
            plan.spare = False
            return expected.output()
        difference = expected.difference(ours[0])
        if reason := watch.fault or difference:
            if difference and step.padded and call.tensors["position_ids"] is None:
                plan.refused = True
                self._fall_back(f"positions of padded rows are not given, and not what they were taken for ({reason})")
            else:
                self._refuse(call.forward, f"its attention is not what the kernels compute ({reason})")
            return expected.output()
        if replayed is not None:
            if difference := expected.difference(replayed[0]):
                self._untrust(plan, call.forward, difference)
            else:
                plan.first_tested = True
                plan.replays_tested = call.length != plan.captured_at
            return expected.output()
        plan.note_tested(call.length)
        if not step.odd and (state := _attends_by(call.forward, plan.model_state.configs)) != call.forward.trusted:
            call.forward.trusted, call.forward.prompts = state, None
            call.forward.prompt_kinds.clear()
        self._kernels |= dict.fromkeys(step.used)
        return expected.output()

    def _capture(self, plan: DecodeGraph, call: Call) -> None:
        if reason := plan.obstacle():
            plan.capturable = plan.spare = False
            self._fall_back(f"the step is not captured: {reason}")
            return
        if self._pool is None or not any(other.graph for other in self._plans.values()):
            self._pool = torch.cuda.graph_pool_handle()  # one that no graph uses any more takes no other
        for key in [key for key, other in self._plans.items() if other.graph is not None][: 1 - _MOST_GRAPHS]:
            del self._plans[key]
        if self._compiled and plan.compiled is None:
            self._compile(plan, call)
        torch.cuda.empty_cache()  # as the capture begins with; else its memory could not be told
        before = torch.cuda.memory_reserved(plan.step.ends.device)
        run = functools.partial(plan.compute, call, compiled=bool(plan.compiled))
        try:
            graph, output = record(run, self._pool, plan.stream)
        except UnsupportedError:
            self._pool = None
            raise
        except Exception as error:  # whatever the model does that a capture does not take
            plan.capturable = plan.spare = False
            self._pool = None
            _LOG.debug("a capture failed", exc_info=True)
            self._fall_back(f"the step cannot be captured: {_first_line(error)}")
            return
        plan.note_captured(graph, output, call.length)
        plan.graph_bytes = max(0, torch.cuda.memory_reserved(plan.step.ends.device) - before)
        self._counts["captures"] += 1

    def _compile(self, plan: DecodeGraph, call: Call) -> None:
        plan.compiled = False
        if plan.step.odd:
            self._fall_back("the step is not compiled: its layers share K and V")
            return
        options = self._compiled if isinstance(self._compiled, dict) else None
        plan.compiled = compilation.compiled(call.forward.original, options)
        try:
            with plan.beside(), kernels.many_shapes():
                plan.compute(call, compiled=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the model does that the compiler does not take
            plan.compiled = False
            _LOG.debug("a compilation failed", exc_info=True)
            self._fall_back(f"the step cannot be compiled: {_first_line(error)}")

    def _untrust(self, plan: DecodeGraph, forward: Forward, difference: str) -> None:
        """After a replay that was not what the step gives: is it the compiler's or the capture's fault?"""
        if plan.compiled:
            plan.compiled, plan.graph, plan.captured = False, None, None
            self._fall_back(f"the step is not compiled: compiled it gives other logits ({difference})")
        else:
            self._refuse(forward, f"a replayed step gives other logits than one that is not ({difference})")

    def _refuse(self, forward: Forward, reason: str) -> None:
        forward.refused = f"{type(forward.model).__name__} decodes as transformers does: {reason}"
        self._fall_back(forward.refused)

    def _fall_back(self, reason: str) -> None:
        if self._fallback != reason:
            _LOG.warning("%s", reason)
        self._fallback = reason


def _attends_by(forward: Forward, configs: list[Any]) -> Any:
    """What a model's attention may depend on. Experts are computed by other means in prompts than in steps."""
    return state_of(forward.model, configs, leaving_out="_experts_implementation_internal")


def _first_line(error: BaseException) -> str:
    """Of the error that was first: the end of a capture or a compilation has another to tell."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]
