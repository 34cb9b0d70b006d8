"""Reads the shapes of the K and V of a model's layers from its configuration.

Where transformers is installed and knows the model type, its configuration class reads the file and its
``DynamicCache`` determines what each layer caches. Otherwise this module interprets the keys of the configuration
itself, including those of older files, and refuses a configuration that it might misread.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vattn.arguments import integer, shown
from vattn.memory.shape import LayerShape

# The keys of the numbers that a layout needs, under the names that different models give them.
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_HEAD_DIM = ("head_dim", "d_kv")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_MOST_LAYERS = 100_000
_NUMBERS = (*_LAYERS, *_HEADS, *_KV_HEADS, *_HEAD_DIM, *_HIDDEN)

# Cache layer classes of transformers: those that vattn stores as rows, those that keep a state whose size does not
# grow with the sequence, and those that keep nothing.
_ROWS = ("DynamicLayer", "DynamicSlidingWindowLayer")
_STATES = ("LinearAttentionLayer",)
_NOTHING = ("DummyLayer",)

# The values that ``layer_types`` may contain.
_FULL = ("full_attention", "attention")
_LOCAL = ("sliding_attention", "chunked_attention")
_RECURRENT = ("linear_attention", "conv", "mamba", "recurrent")
_WITHOUT = ("mlp", "moe")
# Model types in which every layer uses the sliding window of the configuration.
_UNIFORM_WINDOW = ("mistral", "mixtral", "phi3", "starcoder2")
# Model types whose configuration classes interpret these keys differently than the classes of other models do.
_BY_CLASS = ("dory", "longcat_flash", "neomme", "zamba", "zaya")
# A key that contains one of these parts announces layers of other kinds, or a sliding window in some layers only. If
# neither ``layer_types`` nor a key that ``_types`` understands says which layers those are, the configuration is
# refused.
_OTHER_KINDS = (
    *(
        "mamba",
        "ssm",
        "conv",
        "linear_",
        "recurrent",
        "lru",
        "rnn",
        "state_size",
        "hybrid",
        "block_types",
        "index_topk",
    ),
    *("full_att", "local_attention", "global_att", "attn_layer", "layer_indices", "sublayer", "per_layer"),
)
_HARMLESS = ("per_layer_input", "is_hybrid", "linear_bias", "conv_bias", "conv_act")


def described(config: Any, dtype: str | None) -> tuple[list[LayerShape | None], bool]:
    """Reads the shape of each layer from a model's configuration.

    Args:
        config: a Hugging Face configuration, or the mapping of a ``config.json``.
        dtype: name of the dtype of K and V in the cache; None takes the configuration's.

    Returns:
        The shape of each layer (None for a layer that stores no rows), and whether the model has recurrent layers.

    Raises:
        TypeError, ValueError: a value is missing, wrong or not understood; the message names it.
    """
    if isinstance(config, Mapping):
        _require_numbers(config)
        config = _read_by_transformers(config)
    elif not hasattr(config, "__dict__"):
        raise TypeError(f"config must be a model's configuration or the mapping of a config.json, not {shown(config)}")
    kinds = _kinds_by_transformers(config)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    elif isinstance(config, Mapping) and isinstance(config.get("text_config"), Mapping):
        config = config["text_config"]
        _require_numbers(config)
    get = _getter(config)
    name = dtype or str(get("dtype", "torch_dtype", default="bfloat16")).removeprefix("torch.")
    if kinds is None:
        kinds = _kinds_by_keys(get, list(config) if isinstance(config, Mapping) else list(vars(config)))
    each = list(getattr(config, "per_layer_config", ()))
    if len(each) != len(kinds):
        each = [config] * len(kinds)
    shapes: list[LayerShape | None] = [
        replace(_shape(_getter(of_layer)), dtype=name, window=window) if rows else None
        for of_layer, (rows, window, _) in zip(each, kinds, strict=True)
    ]
    return shapes, any(recurrent for _, _, recurrent in kinds)


_Kind = tuple[bool, "int | None", bool]  # whether a layer has rows, its window, whether it keeps a recurrent state


def _getter(config: Any) -> Callable[..., Any]:
    def get(*names: str, default: Any = None) -> Any:
        for name in names:
            try:
                value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
            except RuntimeError as error:  # raised by transformers where the layers differ in this value
                raise ValueError(f"{name} differs between layers: give KVLayout the shape of each") from error
            if value is not None:
                return value
        return default

    return get


def _number(get: Callable[..., Any], *names: str) -> int:
    value = get(*names)
    if value is None:
        raise ValueError(f"the model's configuration lacks {names[0]!r}, which a KV layout needs")
    return _checked(next(name for name in names if get(name) is not None), value)


def _checked(name: str, value: Any) -> int:
    return integer(f"{name!r} of the model's configuration", value, 1)


def _require_numbers(config: Mapping[str, Any]) -> None:
    """Checks the numbers of a file, since transformers' configuration classes accept wrong types.

    Raises:
        TypeError, ValueError: a value is no integer, or too small; the message names it.
    """
    for name in _NUMBERS:
        value = config.get(name)
        if value is not None and not isinstance(value, (list, tuple)):  # a few models list one number per layer
            integer(f"{name!r} of the model's configuration", value, 0 if name in _HEAD_DIM else 1)


def _read_by_transformers(config: Mapping[str, Any]) -> Any:
    """Reads a mapping with transformers' class for the model type.

    Returns:
        The configuration, or the mapping itself where transformers is missing or does not know the model type.

    Raises:
        ValueError: the class refuses the mapping.
    """
    kind = config.get("model_type")
    try:
        known = importlib.import_module("transformers").CONFIG_MAPPING
    except ImportError:
        return config
    if not isinstance(kind, str) or kind not in known:
        return config
    try:
        return known[kind].from_dict(copy.deepcopy(dict(config)))  # from_dict removes parts of its argument
    except Exception as error:
        raise ValueError(f"the model's configuration is none of {kind}: {str(error)[:300]}") from error


def _kinds_by_transformers(config: Any) -> list[_Kind] | None:
    """Returns the kind of each layer, by the cache layers that ``DynamicCache`` makes for the configuration.

    Returns None for an object without ``per_layer_config``, which transformers' configurations have, and for a
    configuration whose layer types ``DynamicCache`` does not read.

    Raises:
        ValueError: ``DynamicCache`` refuses the configuration, or makes a layer that vattn has no rows for.
    """
    if not hasattr(config, "per_layer_config") or _without_layer_types(config):
        return None
    caches = importlib.import_module("transformers.cache_utils")
    try:
        layers = caches.DynamicCache(config=config).layers
    except Exception as error:
        raise ValueError(f"DynamicCache has no layers for a model of type {config.model_type}: {error!r}") from error
    kinds: list[_Kind] = []
    for index, layer in enumerate(layers):
        name = type(layer).__name__
        if name not in (*_ROWS, *_STATES, *_NOTHING):
            raise ValueError(f"layer {index} is cached by a {name}, which vattn has no rows for")
        kinds.append((name in _ROWS, getattr(layer, "sliding_window", None), name in _STATES))
    return kinds


def _without_layer_types(config: Any) -> bool:
    """Whether only ``layers_block_type`` names the layer types, as in older recurrent_gemma classes.

    ``DynamicCache`` does not read that attribute.
    """
    return hasattr(config, "layers_block_type") and getattr(config, "layer_types", None) is None


def _kinds_by_keys(get: Callable[..., Any], keys: list[str]) -> list[_Kind]:
    """Returns the kind of each layer, by the keys of the configuration, including those of older files.

    Raises:
        TypeError, ValueError: a value is missing, wrong or not understood; the message names it.
    """
    count, model = _number(get, *_LAYERS), get("model_type")
    if count > _MOST_LAYERS:
        raise ValueError(f"{_LAYERS[0]!r} of the model's configuration may be at most {_MOST_LAYERS}, not {count}")
    if model in _BY_CLASS:
        raise ValueError(f"a {model} configuration is understood with a transformers that knows the model alone")
    window = get("sliding_window", "attention_chunk_size", "attention_window_size")
    if get("use_sliding_window") is False:
        window = None
    types = _types(get, keys, count, model, window)
    if not isinstance(types, (list, tuple)) or len(types) != count:
        raise ValueError(f"layer_types must name {count} layers, as many as the model has, not {shown(types)}")
    if unknown := sorted({str(kind) for kind in types} - {*_FULL, *_LOCAL, *_RECURRENT, *_WITHOUT}):
        raise ValueError(f"layer_types has {unknown}, whose cache is not known to vattn")
    if window is not None:
        window = _checked("sliding_window", window)
    elif any(kind in _LOCAL for kind in types):
        raise ValueError("the model's configuration has layers with a window and lacks 'sliding_window'")
    shared = integer("'num_kv_shared_layers' of the model's configuration", get("num_kv_shared_layers", default=0), 0)
    if shared > count:
        raise ValueError(f"'num_kv_shared_layers' of the model's configuration is more than its {count} layers")
    return [
        (
            kind in (*_FULL, *_LOCAL) and index < count - shared,
            window if kind in _LOCAL else None,
            kind in _RECURRENT,
        )
        for index, kind in enumerate(types)
    ]


def _types(get: Callable[..., Any], keys: list[str], count: int, model: Any, window: int | None) -> Any:
    """Returns the type of each layer, from ``layer_types`` or from the keys that older configurations have instead."""
    if (types := get("layer_types")) is not None:
        return types
    if (types := get("layers_block_type")) is not None and get("attention_window_size") is None:
        return types

    def one_in(period: Any, last: bool, other: str, of: str = "full_attention") -> list[str]:
        period = _checked("the distance of layers", period)
        return [of if (i + last) % period == 0 else other for i in range(count)]

    def listed(name: str, found: Any, kind: type) -> Any:
        if not isinstance(found, (list, tuple)) or not all(type(each) is kind for each in found):
            raise TypeError(
                f"{name!r} of the model's configuration must be a list of {kind.__name__}, not {shown(found)}"
            )
        return found

    if (period := get("attn_layer_period")) is not None:  # jamba
        period = _checked("attn_layer_period", period)
        offset = integer("'attn_layer_offset' of the model's configuration", get("attn_layer_offset", default=0), 0)
        return ["full_attention" if (i - offset) % period == 0 else "mamba" for i in range(count)]
    if (period := get("full_attention_interval")) is not None:  # qwen3_next
        return one_in(period, True, "linear_attention")
    if (indices := get("attn_layer_indices", "full_attn_idxs")) is not None:  # bamba, lfm2
        indices = listed("attn_layer_indices", indices, int)
        return ["full_attention" if i in indices else "linear_attention" for i in range(count)]
    if (blocks := get("block_types", "_block_types")) and get("attention_window_size"):  # recurrent_gemma
        blocks = listed("block_types", blocks, str)
        types = {"attention": "sliding_attention"}
        return [types.get(blocks[i % len(blocks)], blocks[i % len(blocks)]) for i in range(count)]
    if (pattern := get("hybrid_override_pattern")) is not None:  # nemotron_h
        if not isinstance(pattern, str):
            raise TypeError(
                f"'hybrid_override_pattern' of the model's configuration must be a string, not {shown(pattern)}"
            )
        letters = {"*": "full_attention", "M": "mamba", "-": "mlp", "E": "moe"}
        return [letters.get(letter, letter) for letter in pattern]
    # Private keys such as `_attn_implementation` do not describe layers.
    telling = [key for key in keys if any(part in key for part in _OTHER_KINDS) and not key.startswith("_")]
    telling = [key for key in telling if get(key) is not None and not any(part in key for part in _HARMLESS)]
    if telling:
        raise ValueError(f"a configuration with {telling[0]!r} needs 'layer_types' to say what each layer keeps")
    pattern = get("sliding_window_pattern")
    if window is None:
        return ["full_attention"] * count
    if pattern is not None or model == "gemma2":
        return one_in(pattern or 2, True, "sliding_attention")
    if model is None or model in _UNIFORM_WINDOW:
        return ["sliding_attention"] * count
    raise ValueError(f"a {model} configuration with a window needs 'layer_types' to say which layers have it")


def _shape(get: Callable[..., Any]) -> LayerShape:
    """Returns the heads of a layer as a shape; the caller sets the dtype and the window."""
    heads = _number(get, *_HEADS)
    if (rank := get("kv_lora_rank")) is not None:  # multi-head latent attention (MLA)
        rank, rope = _checked("kv_lora_rank", rank), _number(get, "qk_rope_head_dim")
        if _caches_latents():
            return LayerShape(kv_heads=1, head_dim=rank, v_head_dim=rope)
        return LayerShape(
            kv_heads=heads, head_dim=_number(get, "qk_nope_head_dim") + rope, v_head_dim=_number(get, "v_head_dim")
        )
    if get("global_head_dim") is not None:
        raise ValueError("head_dim differs between layers: give KVLayout the shape of each")
    one_head = get("multi_query") and not get("new_decoder_architecture")
    kv_heads = 1 if one_head else heads if get(*_KV_HEADS) is None else _number(get, *_KV_HEADS)
    if get(*_HEAD_DIM) is not None:
        return LayerShape(kv_heads=kv_heads, head_dim=_number(get, *_HEAD_DIM))
    hidden = _number(get, *_HIDDEN)
    if hidden < heads:
        raise ValueError(f"{_HIDDEN[0]!r} of the model's configuration, {hidden}, is less than its {heads} heads")
    return LayerShape(kv_heads=kv_heads, head_dim=hidden // heads)


def _caches_latents() -> bool:
    """Whether the cache holds MLA's latents, as in transformers from 5.15 on, and not the heads expanded from them.

    Where transformers is not installed, the newer behaviour is assumed.
    """
    try:
        major, minor, *_ = importlib.metadata.version("transformers").split(".")
    except importlib.metadata.PackageNotFoundError:
        return True
    return (int(major), int(minor)) >= (5, 15)
