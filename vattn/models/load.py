"""A model and its tokenizer, from a path, a name or a model that exists already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from vattn.arguments import shown


def loaded(
    model: Any,
    tokenizer: Any = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Returns a model and its tokenizer.

    Args:
        model: a folder, the name of a model that is on the disk, or a model of transformers, which stays as it is.
        tokenizer: a tokenizer, a folder or a name. None takes that of ``model`` where it is a folder or a name.
        dtype: of the weights; ``"auto"`` is what they are stored in. For a folder or a name only.
        device: where the weights go; None is CUDA where there is a GPU. For a folder or a name only.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        TypeError: ``model`` is none of these.
        FileNotFoundError: it is not on the disk; nothing is downloaded.
        OSError: it cannot be read.
    """
    if isinstance(model, str):
        name = model
        _require_on_disk("model", name, "config.json")
        if tokenizer is None:
            tokenizer = name
        where = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True
        )
        model = model.eval().to(where)
    elif not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"model must be a folder, a name or a model of transformers, not {shown(model)}")
    if isinstance(tokenizer, str):
        _require_on_disk("tokenizer", tokenizer, "tokenizer_config.json")
        tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code, local_files_only=True)
    return model, tokenizer


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
