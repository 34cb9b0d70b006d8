"""The layers that vattn reads from a model's configuration: as ``DynamicCache`` makes them, or a precise error."""

from __future__ import annotations

import collections
import copy

import configurations
import pytest
import transformers

from vattn import KVLayout
from vattn.memory import configuration
from vattn.memory.layout import layer_shapes

WHOLE = hasattr(transformers.PretrainedConfig, "per_layer_config")  # versions whose DynamicCache knows all layers


@pytest.mark.thorough
@pytest.mark.skipif(not WHOLE, reason="DynamicCache of this transformers does not know all kinds of layers")
def test_every_configuration_of_transformers():
    found = list(configurations.answers("object", "file"))
    assert [answer for answer in found if not answer.right] == []
    counts = collections.Counter("refused" if answer.got is None else "read" for answer in found)
    assert counts["read"] > 1000
    assert counts["refused"] < 0.1 * len(found)


@pytest.mark.thorough
def test_every_configuration_without_transformers(monkeypatch):
    """A file whose keys are ambiguous is refused, so that no layer is read wrong."""
    monkeypatch.setattr(configuration, "_read_by_transformers", lambda config: config)
    found = list(configurations.answers("file", "old file"))
    if WHOLE:  # in older versions, the expected layers are wrong for models with recurrent states
        assert [answer for answer in found if answer.got is not None and not answer.right] == []
    assert sum(answer.got is not None for answer in found) > 0.6 * len(found)


BASE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 8}
# As in files on the Hugging Face hub: the model type, further keys of the file, and the layers that have rows.
FILES = [
    ("llama", {}, range(8)),
    ("qwen3_next", {"full_attention_interval": 4, "head_dim": 16}, [3, 7]),
    ("bamba", {"attn_layer_indices": [1, 5]}, [1, 5]),
    ("lfm2", {"full_attn_idxs": [2, 5]}, [2, 5]),
    ("jamba", {"attn_layer_period": 4, "attn_layer_offset": 2}, [2, 6]),
    ("nemotron_h", {"hybrid_override_pattern": "M-M*-M*-"}, [3, 6]),
    (
        "recurrent_gemma",
        {"block_types": ["recurrent", "recurrent", "attention"], "attention_window_size": 32, "head_dim": 16},
        [2, 5],
    ),
]


@pytest.mark.parametrize("known", [True, False], ids=["by its class", "by its keys"])
@pytest.mark.parametrize(("model", "more", "rows"), FILES, ids=[model for model, _, _ in FILES])
def test_files_of_hybrids(model, more, rows, known, monkeypatch):
    if not known:
        monkeypatch.setattr(configuration, "_read_by_transformers", lambda config: config)
    shapes, recurrent = configuration.described({**BASE, "model_type": model, **more}, None)
    assert [index for index, shape in enumerate(shapes) if shape] == list(rows)
    assert recurrent == (model != "llama")
    windows = {shape.window for shape in shapes if shape}
    assert windows == ({32} if model == "recurrent_gemma" else {None})


def test_what_is_given_stays_as_it_is():
    given = {**BASE, "model_type": "maskformer", "backbone_config": {"model_type": "swin"}}
    before = copy.deepcopy(given)
    first = configuration.described(given, None)
    assert given == before
    assert configuration.described(given, None) == first


def test_a_model_without_rows_has_no_layout():
    with pytest.raises(ValueError, match=r"layers must name at least one layer|needs 'layer_types'"):
        KVLayout.from_config({"model_type": "mamba2", "num_hidden_layers": 4}, max_len=10)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 0}, r"'num_attention_heads' of the model's configuration must be at least 1, not 0"),
        (
            {"num_attention_heads": "4"},
            r"'num_attention_heads' of the model's configuration must be an integer, not '4'",
        ),
        ({"num_hidden_layers": 8.5}, r"'num_hidden_layers' of the model's configuration must be an integer, not 8\.5"),
        ({"num_hidden_layers": -1}, "'num_hidden_layers' of the model's configuration must be at least 1, not -1"),
        ({"hidden_size": [64]}, "hidden_size|list"),
        ({"num_key_value_heads": True}, "'num_key_value_heads' of the model's configuration must be an integer"),
        ({"hidden_size": 2}, "hidden_size|divisible|heads|head_dim"),
        ({"layer_types": ["full_attention"] * 7}, "layer"),
        ({"layer_types": ["full_attention"] * 9}, "layer"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": ["nonsense"] * 8}, "layer|nonsense"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(change, message, known, monkeypatch):
    if not known:
        monkeypatch.setattr(configuration, "_read_by_transformers", lambda config: config)
    with pytest.raises((TypeError, ValueError), match=message):
        layer_shapes({**BASE, "model_type": "llama", **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_layer_period": 0}, "'attn_layer_period' of the model's configuration must be at least 1, not 0"),
        ({"attn_layer_period": 2.5}, "'attn_layer_period' of the model's configuration must be an integer"),
        ({"attn_layer_period": 4, "attn_layer_offset": "x"}, "'attn_layer_offset' .* must be an integer, not 'x'"),
        ({"num_kv_shared_layers": "a"}, "'num_kv_shared_layers' .* must be an integer, not 'a'"),
        ({"num_kv_shared_layers": -4}, "'num_kv_shared_layers' .* must not be negative, not -4"),
        ({"num_kv_shared_layers": 9}, "'num_kv_shared_layers' .* is more than its 8 layers"),
        ({"attn_layer_indices": 5}, "'attn_layer_indices' .* must be a list of int, not 5"),
        ({"hybrid_override_pattern": 5}, "'hybrid_override_pattern' .* must be a string, not 5"),
        ({"block_types": 5, "attention_window_size": 4}, "'block_types' .* must be a list of str, not 5"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' .* may be at most 100000, not 1000000000"),
    ],
)
def test_what_is_wrong_in_the_file_of_a_model_that_is_not_known_is_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        layer_shapes({**BASE, "model_type": "mine", **change})


@pytest.mark.skipif(not WHOLE, reason="this transformers does not have the model")
def test_layers_of_different_shapes():
    config = transformers.CONFIG_MAPPING["gemma4_text"]()
    shapes = layer_shapes(config)
    assert {shape.head_dim for shape in shapes if shape.window} == {256}
    assert {shape.head_dim for shape in shapes if not shape.window} == {512}
