"""Rotary embeddings whose frequencies depend on the longest position of a call, and how such models are called.

``"dynamic"`` frequencies follow the length of the longest sequence that was computed, and ``"longrope"`` has two sets,
for calls up to and beyond a length. Such a model computes a sequence as ``generate`` does where it is called as
``generate`` calls it: with the whole prompt, and then with one token after the other.
"""

from __future__ import annotations

from typing import Any

import torch

_DEPENDENT = ("dynamic", "longrope")


def _kinds(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """The kind and the parameters of a model's rotary embeddings: one pair, or one for each type of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    sets = [given] if "rope_type" in given else [each for each in given.values() if isinstance(each, dict)]
    return [(str(each.get("rope_type")), each) for each in sets]


def most_positions(config: Any) -> int | None:
    """How many positions a model is made for, or None where its configuration does not say.

    Args:
        config: of the text model.
    """
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 2:
        return None
    factors = [each.get("factor") or 1.0 for kind, each in _kinds(config) if kind == "dynamic"]
    return int(most * max(factors, default=1.0))


def depends_on_call(config: Any, max_model_len: int) -> str | None:
    """Why the frequencies of a position depend on the call, or None where they do not.

    Args:
        config: of the text model.
        max_model_len: positions of the longest sequence.
    """
    for kind, each in _kinds(config):
        if kind not in _DEPENDENT:
            continue
        fixed = config.max_position_embeddings if kind == "dynamic" else each.get("original_max_position_embeddings")
        if max_model_len > (fixed or 0):
            return f"its rotary embeddings ({kind}) depend on the longest position of a call"
    return None


def reset(model: Any) -> None:
    """Forgets the lengths that a model has computed, on which its dynamic frequencies depend."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for prefix, kind in (
            {f"{name}_": kind for name, kind in kinds.items()} if isinstance(kinds, dict) else {"": kinds}
        ).items():
            original = getattr(module, f"{prefix}original_inv_freq", None)
            if not isinstance(kind, str) or "dynamic" not in kind or original is None:
                continue
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
            current = getattr(module, f"{prefix}inv_freq")
            module.register_buffer(f"{prefix}inv_freq", original.to(current.device), persistent=False)


def begins_anew(model: Any, keyword: str, ids: torch.Tensor, cache: Any) -> bool:
    """Whether ``generate`` drops the cache of a sequence and computes it again, as Phi-3 does beyond a length.

    Args:
        model: the model.
        keyword: the argument by which it takes a cache.
        ids: all tokens of the sequence, ``[1, length]``.
        cache: holds all but the last.
    """
    mask = torch.ones_like(ids)
    given = model.prepare_inputs_for_generation(ids, attention_mask=mask, use_cache=True, **{keyword: cache})
    return given.get(keyword) is None
