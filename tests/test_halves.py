"""In bfloat16, decode steps on vattn's kernels stay within the spread of the attention kernels of transformers.

A step may differ from each of transformers' kernels by ``SPREAD`` times what the worst pair of these differs by, and
from the same model in float32 by ``SPREAD`` times what the worst of them does. ``SPREAD`` is more than 1 because each
kernel rounds in its own way, and a few kernels do not show how far correct ones may differ.
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
    """Returns the logits of fixed tokens that follow a prompt one by one: ``[batch, steps, vocabulary]``, float32."""
    ids = prompt(BATCH, PROMPT + STEPS, model.device.type)["input_ids"]
    options = {CACHE_KEYWORD: cache, "use_cache": True}
    with torch.no_grad():
        model(ids[:, :PROMPT], **options)
        steps = [model(ids[:, at : at + 1], **options).logits for at in range(PROMPT, PROMPT + STEPS)]
    return torch.cat(steps, 1).float()


def stock(model, name) -> dict[str, torch.Tensor]:
    """Returns the logits by each attention kernel of transformers that this machine has."""
    found = {}
    for attention in attentions(name):
        model.set_attn_implementation(attention)
        if attention == "eager":
            found["eager"] = logits(model, DynamicCache(config=model.config))
        for backend in BACKENDS if attention == "sdpa" else ():
            try:
                with sdpa_kernel(backend):
                    found[backend.name] = logits(model, DynamicCache(config=model.config))
            except (RuntimeError, UserWarning):  # the kernel is missing, or does not support this model
                continue
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the largest difference between the logits of a token, relative to their norm."""
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
    # FlashInfer is left out because it takes long to compile.
    tried = [name for name in tried if not kernels.KERNELS[name].missing() and name != "flashinfer"]
    assert tried
    for kernel in tried:
        with virtual_of(model, attention=kernel) as cache:
            ours = logits(model, cache)
            stats = cache.decode_stats()
        assert stats.kernel == kernel, stats
        assert stats.replayed >= (0 if device == "cpu" else STEPS - 3)
        assert apart(ours, reference) <= SPREAD * error
        assert max(apart(ours, other) for other in others.values()) <= SPREAD * spread
