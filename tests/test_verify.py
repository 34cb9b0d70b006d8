"""An attention kernel with a fault is refused within two decode steps, and a correct one never."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faults import FAULTS, PROMPT_FAULTS, Moves, decoding, planted, planted_in_prompts
from models import build, prompt, virtual_of

from vattn import CACHE_KEYWORD, kernels
from vattn.cli import demo
from vattn.hf.attach import forward_of
from vattn.hf.watch import Watch

HALVES = (torch.bfloat16, torch.float16)
# Tiny models, and what is changed in their configurations.
TINY: dict[str, dict[str, Any]] = {
    "llama-gqa": {},
    "qwen3": {"head_dim": 16},
    "mistral": {},
    "gemma2": {"attn_logit_softcapping": 2.0},
    "gemma3": {},
    "gpt_oss": {},
}
LENGTH, STEPS = 21, 3
pytestmark = pytest.mark.usefixtures("small")


def tiny(name: str, device: str, dtype: torch.dtype, **more: Any) -> Any:
    model = build(name, "eager", device, **{**TINY[name], **more})
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for weight, parameter in model.named_parameters():
            if weight.endswith("sinks"):
                parameter.fill_(1.0)
    return model.to(dtype)


def stepped(model: Any, cache: Any, device: str, *, batch: int = 2, length: int = LENGTH, padded: bool = False) -> Any:
    """Generates a few tokens behind a prompt, and returns the ``decode_stats`` of the cache."""
    inputs = prompt(batch, length, device, padded=padded)
    model.generate(**inputs, **{CACHE_KEYWORD: cache}, max_new_tokens=STEPS + 1, do_sample=False)
    return cache.decode_stats()


def kernel_of(name: str, device: str) -> str:
    """Returns the name of a kernel that supports all that a model needs."""
    if device == "cuda":
        return "flex" if name in ("gemma2", "gpt_oss") else "fa2"
    return "reference" if name in ("gemma2", "gpt_oss") else "sdpa"


class Watching:
    """Records every ``Watch`` that is made. The first one tells the spread of correct kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Watch] = []
        original = Watch.__init__

        def init(watch: Any, *args: Any) -> None:
            original(watch, *args)
            self.seen.append(watch)

        monkeypatch.setattr(Watch, "__init__", init)


def caught(model: Any, device: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Plants every fault in turn.

    Returns:
        A row for each fault: how far it moves the output of a kernel, whether this counts, because it is more than five
        times what correct kernels differ by, and whether the fault was refused within the first two steps.
    """
    moves = Moves()
    with monkeypatch.context() as patch, virtual_of(model, attention=kernel, capture=False) as cache:
        watching = Watching(patch)
        with decoding(kernel, moves.recording):
            assert stepped(model, cache, device).fallback is None
    spread = watching.seen[0].spread
    rows = []
    for fault in FAULTS:
        with virtual_of(model, attention=kernel, capture=False) as cache, planted(kernel, fault):
            stats = stepped(model, cache, device)
            forward_of(model).refused = forward_of(model).verified = None
        row = {
            "model": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "kernel": kernel,
            "fault": fault,
            "moves": moves.by[fault],
            "honest": spread,
            "counts": moves.by[fault] > 5 * spread,
            "refused": stats.eager <= 1 and "is not what the kernels compute" in (stats.fallback or ""),
        }
        rows.append(row)
    return rows


@pytest.mark.thorough(3)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", TINY)
def test_planted_faults_are_refused(name, dtype, device, monkeypatch):
    rows = caught(tiny(name, device, dtype), device, kernel_of(name, device), monkeypatch)
    assert [row for row in rows if row["counts"] and not row["refused"]] == []
    assert [row for row in rows if row["refused"] and row["moves"] == 0] == []
    assert sum(row["counts"] for row in rows) >= 4


@pytest.mark.thorough
@pytest.mark.model
def test_planted_faults_in_the_real_model_are_refused(folder, monkeypatch):
    model, _ = demo.load(folder)
    rows = caught(model.to(torch.bfloat16), "cpu", "sdpa", monkeypatch)
    assert [row for row in rows if row["counts"] and not row["refused"]] == []
    assert {row["fault"] for row in rows if row["counts"]} >= {"scale x 1.25", "scale x 2", "one short", "one long"}


@pytest.mark.thorough(2)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma2", "gpt_oss"])
def test_planted_faults_in_prompts_are_refused(name, dtype, device):
    model = tiny(name, device, dtype)
    kernel = kernel_of(name, device)
    if device == "cuda" and kernel == "flex":
        pytest.skip("flex decodes only")
    config = model.config
    has = {
        "window": getattr(config, "sliding_window", None) is not None,
        "sinks": name == "gpt_oss",
        "soft cap": name == "gemma2",
    }
    for fault in PROMPT_FAULTS:
        if not all(value for part, value in has.items() if part in fault):
            continue
        with virtual_of(model, attention=kernel, capture=False) as cache:
            stepped(model, cache, device)
            cache.reset()
            with planted_in_prompts(kernel, fault):
                assert stepped(model, cache, device).prompts == 0, fault
            assert forward_of(model).prompts is False, fault
            forward_of(model).prompts = forward_of(model).verified = None
            forward_of(model).prompt_kinds.clear()
    with virtual_of(model, attention=kernel, capture=False) as cache:
        stepped(model, cache, device)
        cache.reset()
        assert stepped(model, cache, device).prompts == 1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_scale_of_fp8_that_is_ignored_is_refused(dtype, device):
    model = tiny("qwen3", device, dtype, head_dim=64)
    kernel = "reference" if device == "cpu" else "flashinfer"
    if device == "cuda" and kernels.KERNELS[kernel].missing():
        pytest.skip("of the kernels that are captured it alone reads fp8")
    options = {"attention": kernel, "capture": False, "kv_dtype": "float8_e4m3fn"}
    for scales, refused in (((0.5, 1.0), True), ((1.0, 0.8), True), ((1.0, 1.0), False)):
        with virtual_of(model, kv_scales=scales, **options) as cache, planted(kernel, "a scale of fp8 ignored"):
            assert ("is not what" in (stepped(model, cache, device).fallback or "")) == refused
        forward_of(model).refused = forward_of(model).verified = None


def honest(model: Any, name: str, device: str, kernel: str, **options: Any) -> dict[str, Any]:
    """Generates with a correct kernel.

    Returns:
        A row, with the largest difference that was found as a part of the difference that is allowed.
    """
    seen: list[Watch] = []
    original = Watch.__init__

    def init(watch: Any, *args: Any) -> None:
        original(watch, *args)
        seen.append(watch)

    with pytest.MonkeyPatch.context() as patch, virtual_of(model, attention=kernel) as cache:
        patch.setattr(Watch, "__init__", init)
        stats = stepped(model, cache, device, **options)
    row = {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "kernel": kernel,
        **options,
        "of what may differ": max((watch.ratio for watch in seen), default=None),
        "refused": stats.fallback,
    }
    forward_of(model).refused = forward_of(model).verified = None
    return row


def honest_kernels(name: str, device: str, dtype: torch.dtype) -> list[str]:
    if device == "cpu":
        return ["reference"] if name in ("gemma2", "gpt_oss") else ["sdpa", "reference"]
    found = ["flex"]
    if name != "gemma2" and dtype != torch.float32:
        found.append("fa2")
    if dtype == torch.bfloat16:
        found.append("fa3")
    return [kernel for kernel in found if not kernels.KERNELS[kernel].missing()]


SHAPES = [(batch, length, padded) for batch in (1, 2, 3, 7) for length in (9, 21, 40) for padded in (False, True)]


def honest_runs(model: Any, name: str, device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    return [
        honest(model, name, device, kernel, batch=batch, length=length, padded=padded)
        for kernel in honest_kernels(name, device, dtype)
        for batch, length, padded in SHAPES
        if not padded or (batch > 1 and length > 20)
    ]


@pytest.mark.thorough(2)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_no_honest_kernel_is_refused(name, dtype, device):
    rows = honest_runs(tiny(name, device, dtype), name, device, dtype)
    assert [row for row in rows if row["refused"]] == []
    assert max(row["of what may differ"] for row in rows) <= 1
