"""Tiny random models of every architecture that VirtualCache is tested with, and modes of ``generate`` to run them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from transformers import DynamicCache, StoppingCriteria

from vattn import CACHE_KEYWORD, VirtualCache

WINDOW = 12  # shorter than the prompts and outputs below, so that windows move


_SHAPE = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip

# By name: the prefix of the model's classes, the class of its configuration if the prefix does not give it, and what
# the configuration changes in _SHAPE.
MODELS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama-gqa": ("Llama", None, {}),
    "llama-mha": ("Llama", None, {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2", None, {}),
    "qwen3": ("Qwen3", None, {"head_dim": 16}),
    "mistral": ("Mistral", None, {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2", None, {"head_dim": 16, "sliding_window": WINDOW}),
    "gemma3": ("Gemma3", "Gemma3TextConfig", {
        "head_dim": 16, "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    }),
    "gpt2": ("GPT2", None, {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}),
    "gpt_oss": ("GptOss", None, {
        "head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }),
    "deepseek_v3": ("DeepseekV3", None, {
        "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1, "kv_lora_rank": 32,
        "q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 24,
    }),
    "t5": ("T5", None, {
        "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4, "eos_token_id": 100,
        "decoder_start_token_id": 0,
    }),
}  # fmt: skip

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# The last two layers attend to the K and V of the first two.
_SHARED_KV = {
    "head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16,
}  # fmt: skip

# Further models, of which only the decode steps are tested.
MORE: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "mixtral": ("Mixtral", None, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", None, {**_EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3Moe", None, {**_EXPERTS, "head_dim": 16}),
    "phi3": ("Phi3", None, {}),
    "gpt_neox": ("GPTNeoX", None, {}),
    "starcoder2": ("Starcoder2", None, {}),
    "olmo2": ("Olmo2", None, {}),
    "cohere2": ("Cohere2", None, {"sliding_window": WINDOW}),
    "granite": ("Granite", None, {}),
    "smollm3": ("SmolLM3", None, {}),
    "stablelm": ("StableLm", None, {}),
    "opt": ("OPT", None, {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gptj": ("GPTJ", None, {"n_embd": 64, "n_head": 4, "n_layer": 4, "rotary_dim": 8, "n_positions": 256}),
    "nemotron": ("Nemotron", None, {}),
    "glm4": ("Glm4", None, {"head_dim": 16}),
    "falcon": ("Falcon", None, {"ffn_hidden_size": 96}),
    "bloom": ("Bloom", None, {"n_head": 4, "n_layer": 4}),
}


# Models with layers that attend to the K and V of others; only the engine is tested with them.
SHARING: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "gemma3n": (
        "Gemma3n",
        "Gemma3nTextConfig",
        {
            **_SHARED_KV,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
            "laurel_rank": 8,
            "vocab_size_per_layer_input": 101,
        },
    ),
    "gemma4": (
        "Gemma4",
        "Gemma4TextConfig",
        {
            **_SHARED_KV,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": 101,
        },
    ),
}  # fmt: skip


def _class(name: str) -> Any:
    prefix = {**MODELS, **MORE, **SHARING}[name][0]
    kind = {"t5": "ForConditionalGeneration", "gpt2": "LMHeadModel"}.get(name, "ForCausalLM")
    return getattr(transformers, prefix + kind)


def attentions(name: str) -> list[str]:
    """The attention implementations that the installed transformers has for a model."""
    return ["sdpa", "eager"] if _class(name)._supports_sdpa else ["eager"]


def build(name: str, attention: str, device: str, **more: Any) -> Any:
    prefix, config_class, changes = {**MODELS, **MORE, **SHARING}[name]
    if not hasattr(transformers, config_class or f"{prefix}Config"):
        pytest.skip("this transformers does not have it")
    config = getattr(transformers, config_class or f"{prefix}Config")(**{**_SHAPE, **changes, **more})
    return _random(_class(name), config, attention, device, end=100)


def _random(kind: Any, config: Any, attention: str, device: str, end: int | None = None) -> Any:
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            # With small weights all logits would be nearly equal, and wrong ones could agree by chance.
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = 0
    return model.eval().to(device)


_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_HYBRID_SHAPE = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
HYBRIDS = {
    "Qwen3Next": {
        **_LINEAR, "layer_types": ["linear_attention"] * 3 + ["full_attention"], "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
    "Lfm2": {
        "layer_types": ["conv", "conv", "full_attention", "conv"], "block_ff_dim": 96,
        "block_auto_adjust_ff_dim": False,
    },
}  # fmt: skip
_RECURRENT = {
    "Mamba2": {
        "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8, "expand": 2,
    },
}  # fmt: skip


def hybrid(name: str) -> Any:
    """Returns a tiny model with layers that keep a state."""
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip("this transformers does not have it")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**_HYBRID_SHAPE, **{**HYBRIDS, **_RECURRENT}[name]})
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation="eager").eval()
    layers = DynamicCache(config=config).layers
    if not any(hasattr(layer, "conv_states") for layer in layers):
        pytest.skip("this transformers keeps its states elsewhere")
    model.generation_config.pad_token_id = 0
    return model


def prompt(batch: int, length: int, device: str, *, padded: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(7))  # the same in all threads
    mask = torch.ones_like(ids)
    if padded:
        for row in range(batch):
            ids[row, : 3 * row] = 0
            mask[row, : 3 * row] = 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


Make = Callable[[Any], Any]
NEW = 24  # tokens generated


def _generate(model: Any, cache: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    torch.manual_seed(3)
    options = {"max_new_tokens": NEW, "do_sample": False, CACHE_KEYWORD: cache, **options}
    return model.generate(**inputs, **options)


def _simple(batch: int = 2, *, padded: bool = False, **options: Any) -> Callable[[Any, Make], list[torch.Tensor]]:
    def run(model: Any, make: Make) -> list[torch.Tensor]:
        inputs = prompt(batch, 10, model.device.type, padded=padded)
        return [_generate(model, make(model), inputs, **options)]

    return run


def _extended(ids: torch.Tensor, more: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    ids = torch.cat([ids, torch.randint(3, 99, (ids.shape[0], more)).to(ids.device)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _resumed(model: Any, make: Make) -> list[torch.Tensor]:
    cache = make(model)
    first = _generate(model, cache, prompt(2, 10, model.device.type), max_new_tokens=NEW // 2)
    second = _generate(model, cache, {"input_ids": first, "attention_mask": torch.ones_like(first)})
    return [first, second]


def _multi_turn(model: Any, make: Make) -> list[torch.Tensor]:
    cache, turns = make(model), []
    inputs = prompt(1, 10, model.device.type)
    for _ in range(3):
        turns.append(_generate(model, cache, inputs, max_new_tokens=8))
        inputs = _extended(turns[-1], 5)
    return turns


def _copied_prefix(model: Any, make: Make) -> list[torch.Tensor]:
    prefix = make(model)
    inputs = prompt(1, 20, model.device.type)
    with torch.no_grad():
        model(**inputs, **{CACHE_KEYWORD: prefix}, use_cache=True)
    outputs = []
    for more in (3, 6):
        outputs.append(_generate(model, copy.deepcopy(prefix), _extended(inputs["input_ids"], more)))
    return outputs


def _repeat_and_select(model: Any, make: Make) -> list[torch.Tensor]:
    cache, steps = make(model), []
    inputs = prompt(2, 17, model.device.type)["input_ids"]
    with torch.no_grad():
        model(inputs, **{CACHE_KEYWORD: cache}, use_cache=True)
        cache.batch_repeat_interleave(3)
        tokens = prompt(6, 4, model.device.type)["input_ids"]
        steps.append(model(tokens, **{CACHE_KEYWORD: cache}, use_cache=True).logits)
        cache.batch_select_indices(torch.tensor([5, 0, 3], device=model.device))
        steps.append(model(tokens[:3], **{CACHE_KEYWORD: cache}, use_cache=True).logits)
        cache.reorder_cache(torch.tensor([2, 2, 0], device=model.device))
        steps.append(model(tokens[:3, :1], **{CACHE_KEYWORD: cache}, use_cache=True).logits)
    return [step.argmax(-1) for step in steps]


def _reset(model: Any, make: Make) -> list[torch.Tensor]:
    cache, outputs = make(model), []
    for batch in (2, 1, 3):
        outputs.append(_generate(model, cache, prompt(batch, 10 + batch, model.device.type)))
        if isinstance(getattr(cache, "self_attention_cache", cache), VirtualCache):
            cache.reset()
        else:  # DynamicCache.reset keeps zeroed rows in older versions
            cache = make(model)
    return outputs


def _crop(model: Any, make: Make) -> list[torch.Tensor]:
    cache, steps = make(model), []
    tokens = prompt(2, 30, model.device.type)["input_ids"]
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()
    with torch.no_grad():
        model(tokens[:, :9], **{CACHE_KEYWORD: cache}, use_cache=True)
        cache.crop(-4)
        steps.append(model(tokens[:, 5:11], **{CACHE_KEYWORD: cache}, use_cache=True).logits)
        cache.crop(-2)
        steps.append(model(tokens[:, 9:10], **{CACHE_KEYWORD: cache}, use_cache=True).logits)
    return [step.argmax(-1) for step in steps]


def _assisted(model: Any, make: Make) -> list[torch.Tensor]:
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    return [_generate(model, make(model), prompt(1, 10, model.device.type), assistant_model=assistant)]


MODES: dict[str, Callable[[Any, Make], list[torch.Tensor]]] = {
    "greedy": _simple(),
    "padded": _simple(3, padded=True),
    "sampling": _simple(do_sample=True, num_return_sequences=3),
    "beams": _simple(num_beams=4),
    "beams returned": _simple(num_beams=4, num_return_sequences=3, padded=True),
    "prompt lookup": _simple(1, prompt_lookup_num_tokens=4),
    "assisted": _assisted,
    "chunked prefill": _simple(prefill_chunk_size=4),
    "resumed": _resumed,
    "multi-turn": _multi_turn,
    "copied prefix": _copied_prefix,
    "repeat and select": _repeat_and_select,
    "reset": _reset,
    "crop": _crop,
}
SPECULATIVE = ("prompt lookup", "assisted")  # these crop, which older sliding-window layers cannot

# The modes that transformers supports for encoder-decoder models.
SEQ2SEQ_MODES = ("greedy", "padded", "sampling", "beams", "beams returned", "reset")

CASES = [
    (name, attention, mode)
    for name in MODELS
    for attention in attentions(name)
    for mode in (SEQ2SEQ_MODES if name == "t5" else MODES)
]


def generated(
    model: Any, cache: Any, batch: int = 2, length: int = 10, padded: bool = False, **options: Any
) -> torch.Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    inputs = prompt(batch, length, model.device.type, padded=padded)
    return model.generate(**inputs, **{CACHE_KEYWORD: cache}, **options)


_TEMPLATE = """{% for m in messages %}{% if m.role == 'nobody' %}{{ raise_exception('who?') }}{% endif %}w1
 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w2{% endif %}"""


def saved(folder: Path) -> Path:
    """Saves a small model in a folder, with a tokenizer whose tokens are the words from w0 to w100; the folder."""
    model = build("llama-gqa", "eager", "cpu")
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(101)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", chat_template=_TEMPLATE)
    tokenizer.save_pretrained(folder)
    return folder


def adaptable(model: Any) -> Any:
    """Makes an MLP of a Llama depend on its ``active_adapter``, as PEFT's layers do, and returns it.

    With "a" its output is unchanged, with "b" three times as large.
    """
    layer = model.model.layers[1].mlp
    forward, layer.active_adapter = layer.forward, "a"
    known = {"a": 1, "b": 3}
    layer.forward = lambda states: forward(states) * known[layer.active_adapter]
    return layer


@contextlib.contextmanager
def virtual_of(model: Any, **options: Any) -> Iterator[VirtualCache]:
    """Yields a ``VirtualCache`` that is made with a model or a configuration, and checks and closes it afterwards."""
    cache = VirtualCache(model, **{"max_len": 160, "attention": "auto", **options})
    yield cache
    cache.check()
    cache.close()


class At(StoppingCriteria):
    """Calls ``do`` when the generated text has reached a length. It never stops the generation."""

    def __init__(self, length, do):
        self.length, self.do = length, do

    def __call__(self, input_ids, scores, **options):
        if input_ids.shape[1] == self.length:
            self.do()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def molmo2(device: str) -> Any:
    """Returns a tiny vision-language model in which the tokens of an image attend to each other."""
    heads = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    names = ("image_start_token", "low_res_image_start_token", "image_end_token", "image_patch", "frame_start_token")
    config = transformers.Molmo2Config(
        text_config={**_SHAPE, "num_hidden_layers": 2, "head_dim": 16, "additional_vocab_size": 8},
        vision_config={**heads, "num_hidden_layers": 2, "head_dim": 16, "image_size": [28, 28], "patch_size": 14},
        adapter_config={**heads, "head_dim": 16, "text_hidden_size": 64, "vision_feature_layer": [-1]},
        **{f"{name}_id": 101 + i for i, name in enumerate((*names, "frame_end_token"))},
    )
    return _random(transformers.Molmo2ForConditionalGeneration, config, "sdpa", device)


def qwen2_vl(device: str) -> Any:
    """Returns a tiny vision-language model in which positions behind an image are not the numbers of tokens before."""
    rope = "rope_parameters" if transformers.__version__ >= "5" else "rope_scaling"
    sections = {"rope_type": "default", "type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2VLConfig(
        text_config={**_SHAPE, "num_hidden_layers": 2, rope: sections},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4},
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return _random(transformers.Qwen2VLForConditionalGeneration, config, "sdpa", device)
