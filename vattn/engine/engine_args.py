"""``EngineArgs``: a model and how it is served, of which ``LLM`` and ``AsyncLLM`` are made; the names are vLLM's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from vattn.arguments import choice, flag, integer, shown
from vattn.engine.engine import Engine
from vattn.engine.options import EngineOptions
from vattn.engine.sampling_params import SamplingParams
from vattn.models.load import is_dtype, loaded


@dataclass(frozen=True, kw_only=True)
class EngineArgs(EngineOptions):
    """A model and how it is served.

    Args:
        model: a folder, the name of a model that is on the disk, or a model of transformers, which is not changed.
        tokenizer: a tokenizer, a folder or a name; None takes the model's. A model object needs one for texts.
        skip_tokenizer_init: whether there is no tokenizer: prompts are token ids then.
        dtype: of the weights; ``"auto"`` is what they are stored in. A model object keeps its own.
        device: where the weights go; None is CUDA where there is a GPU. A model object stays where it is.
        trust_remote_code: whether code that comes with the model may run.
        quantization: the method by which the model's weights are quantized. The model says it, so that this is only
            compared; None compares nothing.
        generation_config: ``"auto"`` takes the model's configuration for requests without ``SamplingParams``,
            ``"vllm"`` the defaults of ``SamplingParams``.
        tensor_parallel_size: over how many GPUs a layer is spread; one, so far.

    The other arguments are those of ``EngineOptions``.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range.
    """

    model: Any
    tokenizer: Any = None
    skip_tokenizer_init: bool = False
    dtype: str | torch.dtype = "auto"
    device: str | torch.device | None = None
    trust_remote_code: bool = False
    quantization: str | None = None
    generation_config: str = "auto"
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("skip_tokenizer_init", self.skip_tokenizer_init)
        flag("trust_remote_code", self.trust_remote_code)
        if not isinstance(self.model, (str, os.PathLike)):
            for name, least in (("dtype", "auto"), ("device", None)):
                if getattr(self, name) != least:
                    raise ValueError(f"{name} is of a model that is loaded: change the model object instead")
        elif not is_dtype(self.dtype):
            raise ValueError(f"dtype must be 'auto' or the name of a floating-point dtype, not {shown(self.dtype)}")
        if self.skip_tokenizer_init and self.tokenizer is not None:
            raise ValueError("skip_tokenizer_init leaves out the tokenizer, and one is given")
        if self.quantization is not None and not isinstance(self.quantization, str):
            raise TypeError(f"quantization must be the name of a method, not {shown(self.quantization)}")
        choice("generation_config", self.generation_config, ("auto", "vllm"))
        if integer("tensor_parallel_size", self.tensor_parallel_size, 1) > 1:
            raise ValueError(f"tensor_parallel_size is {self.tensor_parallel_size}, and one GPU is all that is used")

    def engine(self) -> Engine:
        """Loads the model, and makes its engine.

        Raises:
            FileNotFoundError: the model or the tokenizer is not on the disk.
            ValueError: the model is none that can be served.
        """
        model, tokenizer = loaded(
            self.model,
            self.tokenizer,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
            texts=not self.skip_tokenizer_init,
        )
        if self.quantization is not None and self.quantization != (method := _quantization_of(model)):
            raise ValueError(f"quantization is {self.quantization!r}, and the model's is {method!r}")
        return Engine(model, tokenizer, self)

    def default_sampling_params(self, config: Any) -> SamplingParams:
        """What requests without parameters get.

        Args:
            config: the model's generation configuration, or None.
        """
        if self.generation_config == "vllm":
            return SamplingParams()
        samples = config is not None and getattr(config, "do_sample", False)
        names = ("repetition_penalty", *(("temperature", "top_k", "top_p", "min_p") if samples else ()))
        given = {name: value for name in names if (value := getattr(config, name, None)) is not None}
        return SamplingParams(**{**given, **({} if samples else {"temperature": 0.0})})


def _quantization_of(model: Any) -> str | None:
    """The method by which a model's weights are quantized, as its configuration names it, or None."""
    config = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))
