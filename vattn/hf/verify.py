"""Compares decode steps and prompts on kernels with what transformers computes for the same call.

The attention of each layer is compared with its definition while it is computed (``Watch``), and the logits with those
of transformers (``Expected``). A step or prompt that is compared returns the output of transformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from vattn.errors import Error
from vattn.hf.attach import Forward
from vattn.hf.decode_graph import DecodeGraph
from vattn.hf.decode_stats import DecodeLog
from vattn.hf.prefill import Prompt
from vattn.hf.step_call import StepCall
from vattn.hf.store import Store
from vattn.hf.watch import PromptWatch, Watch
from vattn.models.attention import UnsupportedError
from vattn.models.expected import Expected
from vattn.models.state import state_of

_LOG = logging.getLogger("vattn")


def attends_by(forward: Forward, configs: list[Any]) -> Any:
    """Returns what a model's attention may depend on, to be compared with a later state of the model.

    How experts are computed is left out, since transformers computes them differently in prompts and in steps.

    Args:
        forward: of the model.
        configs: its configurations.
    """
    return state_of(forward.model, configs, leaving_out="_experts_implementation_internal")


def verified_step(graph: DecodeGraph, call: StepCall, log: DecodeLog, replayed: Any = None) -> Any:
    """Compares a step on slot tensors with the same step as transformers computes it.

    Args:
        graph: of the step.
        call: the step.
        log: notes what differs.
        replayed: the output of a replay of the step, which is compared too; or None.

    Returns:
        The output of transformers.

    Raises:
        UnsupportedError: the step cannot be computed on slot tensors.
    """
    context, store = graph.context, call.store
    context.watch = watch = Watch(store, call.mask, call.length, call.batch)
    try:
        with graph.runner.on_capture_stream():
            ours = graph.run(call)
            ignores_idle = not graph.runner.idle or replayed is not None or graph.ignores_idle_rows(call, ours[0])
    except (UnsupportedError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedError(f"{type(error).__name__}: {error}") from error
    finally:
        context.watch = None

    def compute() -> Any:
        store.lengths[:] = [call.length] * len(store.lengths)
        store.ready.clear()
        return call.forward.original(**call.given)

    expected = Expected(compute, graph.model_state.configs, watch.spread, rounded=call.rounded)
    if not expected.tells():
        return expected.output()
    if not ignores_idle:
        graph.can.idle = False
        return expected.output()
    difference = expected.difference(ours[0])
    if reason := watch.fault or difference:
        if difference and context.rows.padded and call.tensors["position_ids"] is None:
            graph.can.slots = False
            log.fall_back(f"positions of padded rows are not given, and not what they were taken for ({reason})")
        else:
            log.refuse(call.forward, f"its attention is not what the kernels compute ({reason})")
        return expected.output()
    if replayed is not None:
        if difference := expected.difference(replayed[0]):
            _distrust_replay(graph, call.forward, log, difference)
        else:
            graph.tested.note_replay(call.length)
        return expected.output()
    graph.tested.note(call.length, context.rows.padded, graph.runner.idle)
    if not context.shares_kv_across_layers:
        state = attends_by(call.forward, graph.model_state.configs)
        if state != call.forward.verified:
            call.forward.verified, call.forward.prompts = state, None
            call.forward.prompt_kinds.clear()
    log.kernels |= dict.fromkeys(context.used)
    return expected.output()


def _distrust_replay(graph: DecodeGraph, forward: Forward, log: DecodeLog, difference: str) -> None:
    """Drops the compiled step after a replay that differs from its step; refuses the model where none is compiled."""
    if graph.can.compiled:
        graph.can.compiled = False
        graph.runner.discard()
        log.fall_back(f"the step is not compiled: compiled it gives other logits ({difference})")
    else:
        log.refuse(forward, f"a replayed step gives other logits than one that is not ({difference})")


def verified_prompt(
    prompt: Prompt, kind: Any, configs: list[Any], store: Store, forward: Forward, compute: Callable[[], Any]
) -> tuple[Any, bool]:
    """Compares a prompt on kernels with the same prompt as transformers computes it.

    Args:
        prompt: computes the attention on kernels.
        kind: of the prompt. Prompts of the same kind are not compared once this one has agreed.
        configs: the configurations of the model.
        store: of the cache.
        forward: of the model.
        compute: calls the model.

    Returns:
        The output of transformers, and whether the kernels agreed with it. They also count as agreeing where its logits
        are NaN and nothing can be compared; then later prompts of this kind are compared.

    Raises:
        UnsupportedError: the prompt cannot be computed on kernels.
    """
    lengths = list(store.lengths)
    prompt.watch = watch = PromptWatch(prompt.hidden, prompt.start, prompt.n, store.windows)
    try:
        with prompt.run(configs):
            ours = compute()
    except UnsupportedError:
        raise
    except Exception as error:
        ours_alone = not isinstance(error, (Error, torch.OutOfMemoryError))
        raise UnsupportedError(f"{type(error).__name__}: {error}", of_model=ours_alone) from error
    last = ours[0][:, -1:].clone()
    del ours

    def again() -> Any:
        store.lengths[:] = lengths
        store.ready.clear()
        return compute()

    expected = Expected(again, configs, watch.spread, rounded=store.options.scales is not None)
    tells = expected.tells()
    if tells and (reason := watch.fault or expected.difference(last)):
        forward.prompts = False
        _LOG.warning("prompts run as transformers runs them: kernels give something else (%s)", reason)
        return expected.output(), False
    if tells:
        forward.prompts = True
        forward.prompt_kinds.add(kind)
    return expected.output(), True
