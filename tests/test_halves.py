"""In bfloat16 a step on vattn's kernels differs no more from those of transformers' than these do from each other.

The reference is the same model in float32. ``SPREAD`` is what a further stock kernel may be off by, beside the worst
pair of the others: each rounds in its own way, and a few of them do not show all there is.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from models import attentions, build, prompt, virtual_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from vattn import CACHE_KEYWORD, kernels

SPREAD = 1.5
BATCH, PROMPT, STEPS = 4, 100, 24
BACKENDS = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
pytestmark = pytest.mark.usefixtures("small")


def logits(model, cache) -> torch.Tensor:
    """Of given tokens, one by one behind a prompt: ``[batch, steps, vocabulary]``, in float32."""
    ids = prompt(BATCH, PROMPT + STEPS, model.device.type)["input_ids"]
    options = {CACHE_KEYWORD: cache, "use_cache": True}
    with torch.no_grad():
        model(ids[:, :PROMPT], **options)
        steps = [model(ids[:, at : at + 1], **options).logits for at in range(PROMPT, PROMPT + STEPS)]
    return torch.cat(steps, 1).float()


def stock(model, name) -> dict[str, torch.Tensor]:
    """By each of transformers' ways that this machine has."""
    found = {}
    for attention in attentions(name):
        model.set_attn_implementation(attention)
        if attention == "eager":
            found["eager"] = logits(model, DynamicCache(config=model.config))
        for backend in BACKENDS if attention == "sdpa" else ():
            try:
                with sdpa_kernel(backend):
                    found[backend.name] = logits(model, DynamicCache(config=model.config))
            except (RuntimeError, UserWarning):  # it is not there, or not for this model
                continue
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The most that the logits of a token differ by, of their norm."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha", "qwen3", "mistral", "gpt2"])
def test_within_the_spread_of_stock_kernels(name, device):
    wide = build(name, "eager", device)
    reference = logits(wide, DynamicCache(config=wide.config))
    model = copy.deepcopy(wide).to(torch.bfloat16)
    others = stock(model, name)
    assert len(others) >= 2
    spread = max(apart(a, b) for a, b in itertools.permutations(others.values(), 2))
    error = max(apart(other, reference) for other in others.values())
    model.set_attn_implementation("sdpa")
    tried = ["reference"] if device == "cpu" else [k.name for k in kernels.KERNELS.values() if k.capturable]
    tried = [name for name in tried if not kernels.KERNELS[name].missing() and name != "flashinfer"]  # it compiles long
    assert tried
    for kernel in tried:
        with virtual_of(model, attention=kernel) as cache:
            ours = logits(model, cache)
            stats = cache.decode_stats()
        assert stats.kernel == kernel, stats
        assert stats.replayed >= (0 if device == "cpu" else STEPS - 3)
        assert apart(ours, reference) <= SPREAD * error
        assert max(apart(ours, other) for other in others.values()) <= SPREAD * spread
