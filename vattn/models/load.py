"""A model and its tokenizer, from a path, a name or a model that exists already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from vattn.arguments import shown

_DTYPES: dict[Any, str] = {"half": "float16", "float": "float32"}  # further names, which vLLM has


def loaded(
    model: Any,
    tokenizer: Any = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    texts: bool = True,
) -> tuple[Any, Any]:
    """Returns a model and its tokenizer.

    Args:
        model: a folder, the name of a model that is on the disk, or a model of transformers, which stays as it is.
        tokenizer: a tokenizer, a folder or a name. None takes that of ``model`` where it is a folder or a name.
        dtype: of the weights; ``"auto"`` is what they are stored in. For a folder or a name only.
        device: where the weights go; None is CUDA where there is a GPU. For a folder or a name only.
        trust_remote_code: whether code that comes with the model may run.
        texts: whether there is a tokenizer.

    Raises:
        TypeError: ``model`` is none of these.
        FileNotFoundError: it is not on the disk; nothing is downloaded.
        OSError: it cannot be read.
    """
    if isinstance(model, (str, os.PathLike)):
        name = os.fspath(model)
        _require_on_disk("model", name, "config.json")
        if tokenizer is None:
            tokenizer = name
        where = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=_DTYPES.get(dtype, dtype), trust_remote_code=trust_remote_code, local_files_only=True
        )
        model = model.eval() if _placed(model) else model.eval().to(where)
    elif not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model must be a folder, a name or a model of transformers, not {shown(model)}")
    if not texts:
        return model, None
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = os.fspath(tokenizer)
        _require_on_disk("tokenizer", tokenizer, "tokenizer_config.json")
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code, local_files_only=True)
    return model, tokenizer


def is_dtype(given: Any) -> bool:
    """Whether something names a dtype of weights: ``"auto"``, a floating-point dtype of torch or the name of one."""
    found = getattr(torch, _DTYPES.get(given, given), None) if isinstance(given, str) else given
    return given == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point)


def _placed(model: Any) -> bool:
    """Whether the weights are where they belong: transformers puts some quantized ones on the GPU and moves none."""
    return getattr(model, "is_quantized", False) and next(model.parameters()).device.type != "cpu"


def _require_on_disk(argument: str, name: str, file: str) -> None:
    """Raises FileNotFoundError where ``name`` is neither a folder, nor was ``file`` of it downloaded."""
    if Path(name).is_dir():
        return
    try:
        cached_file(name, file, local_files_only=True)
    except (OSError, ValueError) as error:  # ValueError: it cannot be a name
        raise FileNotFoundError(
            f"{argument} {name!r} is not on this machine: give a folder, or download it first (hf download NAME)"
        ) from error
