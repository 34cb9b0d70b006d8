"""Which architectures decode on vattn's kernels, and are captured; with --tables, the test writes them to a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import CACHE_KEYWORD, MODELS, MORE, WINDOW, attentions, build, prompt, virtual_of

KNOWN = {**MODELS, **MORE}
FALL_BACK = {  # models that decode as transformers does, and why
    "deepseek_v3": "its K and V are made of a latent behind the cache",
    "falcon": "it adds to the mask",
    "bloom": "it has no position_ids",
}
NEW = 24


def traits(config: Any) -> str:
    found = {
        "sliding window": getattr(config, "sliding_window", None) == WINDOW,
        "experts": any(
            getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")
        ),
        "soft cap": getattr(config, "attn_logit_softcapping", None),
        "sinks": config.model_type == "gpt_oss",
    }
    return ", ".join(name for name, has in found.items() if has)


def steps_of(name: str, device: str) -> tuple[dict[str, Any], float]:
    """Generates with a model, in bfloat16 on a GPU and in float32 on a CPU.

    Returns:
        The model's row of the table, and the largest distance of a generated token's logit from the highest logit, as
        a part of the distance from the highest to the mean.
    """
    model = build(name, attentions(name)[0], device).to(torch.bfloat16 if device == "cuda" else torch.float32)
    model.generation_config.eos_token_id = None
    with virtual_of(model) as cache, torch.no_grad():
        inputs = prompt(2, 10, device)
        ids = model.generate(**inputs, **{CACHE_KEYWORD: cache}, max_new_tokens=NEW, do_sample=False)
        stats = cache.decode_stats()
        # The model is given the whole text at once; each generated token must then have about the highest logit.
        logits = model(ids, use_cache=False).logits[:, 9:-1].float()
    chosen = logits.gather(2, ids[:, 10:, None])[..., 0]
    short = (logits.amax(-1) - chosen) / (logits.amax(-1) - logits.mean(-1))
    steps = stats.replayed + stats.eager
    taken = "captured" if stats.replayed else "eager" if steps else "as transformers does"
    assert steps == (NEW - 1 if steps else 0)
    row = {
        "architecture": type(model).__name__,
        "with": traits(model.config),
        "steps": taken,
        "replayed": stats.replayed,
        "kernel": stats.kernel,
        "reason": stats.fallback or (None if steps else FALL_BACK.get(name)),
    }
    return row, float(short.max())


@pytest.mark.thorough
def test_architectures(device, request):
    found = {}
    for name, (prefix, config_class, _) in KNOWN.items():
        if name not in ("t5", "llama-mha") and hasattr(transformers, config_class or f"{prefix}Config"):
            found[name] = steps_of(name, device)
    rows = [row for row, _ in found.values()]
    captured = [row for row in rows if row["steps"] == "captured"]
    if folder := request.config.getoption("tables"):
        sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
        import report

        report.write("architectures", device, rows, {"captured_architectures": len(captured)}, Path(folder))
    assert {name: short for name, (_, short) in found.items() if short > (0.1 if device == "cuda" else 1e-3)} == {}
    for name, (row, _) in found.items():
        older = transformers.__version__.startswith("4.") or name in ("gptj", "gpt_oss")
        if name not in FALL_BACK and not older:
            assert row["steps"] == ("captured" if device == "cuda" else "eager"), row
    if device == "cuda":
        assert len(captured) >= 10
        assert {"sliding window", "experts", "soft cap"} <= {
            part for row in captured for part in row["with"].split(", ")
        }
