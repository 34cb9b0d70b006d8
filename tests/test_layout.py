from __future__ import annotations

import pytest

from vattn import KVLayout, LayerShape

LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}
MIB = 2**20


def test_llama_8b_interleaved():
    layout = KVLayout.from_config(LLAMA_8B, max_len=131072)
    assert layout.bytes_per_token == 128 * 1024
    assert layout.tokens_per_granule == 16
    assert layout.growth_step_bytes == 2 * MIB
    assert layout.static_bytes == 16 * 1024 * MIB
    assert layout.mapped_bytes(8192) == 1024 * MIB
    assert layout.waste(8192) == 0
    assert layout.mapped_bytes(8193) == 1026 * MIB
    assert layout.waste(1) == 1 - 1 / 16
    assert layout.static_waste(8192) == 1 - 1 / 16
    assert layout.mapped_bytes(0) == 0
    assert layout.waste(0) == 0


def test_llama_8b_compact():
    layout = KVLayout.from_config(LLAMA_8B, max_len=131072, kind="compact")
    assert len(layout.planes) == 64
    assert layout.tokens_per_granule == 1024
    assert layout.growth_step_bytes == 128 * MIB
    assert layout.mapped_bytes(1) == 128 * MIB
    assert layout.mapped_bytes(8192) == 1024 * MIB


def test_planes_of_some_layers():
    layout = KVLayout.from_config(LLAMA_8B, max_len=131072, layers_per_plane=8)
    assert layout.bytes_per_token == 128 * 1024
    assert layout.tokens_per_granule == 64
    assert layout.growth_step_bytes == 8 * MIB
    assert [group.layers for group in layout.groups] == [tuple(range(at, at + 8)) for at in (0, 8, 16, 24)]
    assert (layout.mapped_bytes(64), layout.mapped_bytes(65)) == (8 * MIB, 16 * MIB)


@pytest.mark.parametrize(
    ("most", "sizes"), [(None, [7]), (9, [7]), (7, [7]), (6, [3, 4]), (3, [2, 2, 3]), (1, [1] * 7)]
)
def test_planes_have_about_as_many_layers(most, sizes):
    layout = KVLayout.uniform(layers=7, kv_heads=1, head_dim=64, max_len=10, layers_per_plane=most)
    assert [len(group.layers) for group in layout.groups] == sizes
    assert [plane.row_bytes for plane in layout.planes] == [256 * size for size in sizes]
    assert [layer for group in layout.groups for layer in group.layers] == list(range(7))


@pytest.mark.parametrize("windows", [(None, 100, None, 100, None), (100, None, None, None, 100)])
def test_groups_are_in_the_order_of_their_first_layers(windows):
    shapes = [LayerShape(kv_heads=1, head_dim=64, dtype="float16", window=window) for window in windows]
    firsts = [group.layers[0] for group in KVLayout(shapes, max_len=1000, layers_per_plane=1).groups]
    assert firsts == list(range(5))


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_layers_per_plane_is_checked(value, error):
    with pytest.raises(error, match="layers_per_plane"):
        KVLayout.uniform(layers=2, kv_heads=1, head_dim=64, max_len=10, layers_per_plane=value)
    with pytest.raises(ValueError, match="layers_per_plane must be None"):
        KVLayout.uniform(layers=2, kv_heads=1, head_dim=64, max_len=10, kind="compact", layers_per_plane=1)


def test_a_row_interleaves_layers_then_k_and_v():
    layout = KVLayout.uniform(layers=3, kv_heads=2, head_dim=64, max_len=10, dtype="float32")
    (group,) = layout.groups
    assert group.k_offsets == (0, 1024, 2048)
    assert group.v_offsets == (512, 1536, 2560)
    assert layout.planes[0].row_bytes == 3072


def test_rows_are_padded_to_sixteen_bytes():
    layout = KVLayout.uniform(layers=1, kv_heads=1, head_dim=3, v_head_dim=5, max_len=10, dtype="float32")
    assert (layout.groups[0].v_offsets, layout.planes[0].row_bytes) == ((16,), 48)


def test_layers_of_another_shape_or_window_have_their_own_planes():
    full = LayerShape(kv_heads=2, head_dim=64, dtype="float16")
    local = LayerShape(kv_heads=2, head_dim=64, dtype="float16", window=100)
    layout = KVLayout([full, local, None, full, local], max_len=1000, granularity=4096)
    assert [group.layers for group in layout.groups] == [(0, 3), (1, 4)]
    assert [plane.window for plane in layout.planes] == [None, 100]
    assert layout.used_bytes(1000) == 1000 * 1024 + 100 * 1024
    # Rows 900 to 999 of 1 KiB: granules 225 to 249.
    assert layout.mapped_bytes(1000) == 250 * 4096 + 25 * 4096


def test_windows_from_a_config():
    config = {**LLAMA_8B, "sliding_window": 4096}
    assert {plane.window for plane in KVLayout.from_config(config, max_len=10).planes} == {4096}
    config["use_sliding_window"] = False
    assert {plane.window for plane in KVLayout.from_config(config, max_len=10).planes} == {None}
    types = ["full_attention", "sliding_attention"] * 16
    config = {**LLAMA_8B, "sliding_window": 512, "layer_types": types}
    assert [plane.window for plane in KVLayout.from_config(config, max_len=10).planes] == [None, 512]


def test_old_files_without_layer_types():
    def windows(**changes):
        config = {**LLAMA_8B, "num_hidden_layers": 6, "sliding_window": 512, **changes}
        return [layer and layer.window for layer in KVLayout.from_config(config, max_len=10).layers]

    assert windows() == windows(model_type="mistral") == [512] * 6
    assert windows(model_type="gemma2") == [512, None] * 3
    assert windows(model_type="gemma3_text", sliding_window_pattern=6) == [512] * 5 + [None]
    with pytest.raises(ValueError, match="a qwen9 configuration with a window needs 'layer_types'"):
        windows(model_type="qwen9")
    jamba = {**LLAMA_8B, "num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2}
    layers = KVLayout.from_config(jamba, max_len=10).layers
    assert [i for i, layer in enumerate(layers) if layer] == [2, 6]


def test_one_head_for_all_queries():
    falcon = {**LLAMA_8B, "num_key_value_heads": None, "multi_query": True, "num_kv_heads": 71}
    assert KVLayout.from_config(falcon, max_len=10).layers[0].kv_heads == 1


def test_mla_keeps_what_transformers_does(monkeypatch):
    config = {
        "num_hidden_layers": 2, "num_attention_heads": 128, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    }  # fmt: skip
    expanded = LayerShape(kv_heads=128, head_dim=192, v_head_dim=128)
    latent = LayerShape(kv_heads=1, head_dim=512, v_head_dim=64)
    for version, shape in (("4.57.6", expanded), ("5.14.1", expanded), ("5.15.0", latent), ("6.0.0.dev0", latent)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        assert KVLayout.from_config(config, max_len=10).layers[0] == shape


def test_gpt2_names_and_nested_and_shared_configs():
    gpt2 = {"n_layer": 12, "n_head": 12, "n_embd": 768}
    assert KVLayout.from_config(gpt2, max_len=10).layers[0] == LayerShape(kv_heads=12, head_dim=64)
    nested = {"text_config": {**LLAMA_8B, "num_kv_shared_layers": 12}}
    assert [layer is None for layer in KVLayout.from_config(nested, max_len=10).layers] == [False] * 20 + [True] * 12


def test_a_transformers_config():
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(num_hidden_layers=4, sliding_window=64, head_dim=32, num_key_value_heads=2)
    layout = KVLayout.from_config(config, max_len=10, dtype="float32")
    assert sorted(str(plane.window) for plane in layout.planes) == ["64", "None"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": None}, "lacks 'num_hidden_layers'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"layer_types": ["mystery"] * 32}, "mystery"),
        ({"torch_dtype": "int4"}, "dtype 'int4' is not supported"),
        ({"global_head_dim": 512}, "head_dim differs between layers"),
    ],
)
def test_a_config_that_does_not_do(change, message):
    with pytest.raises(ValueError, match=message):
        KVLayout.from_config({**LLAMA_8B, **change}, max_len=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_len": 0}, "max_len"),
        ({"kind": "paged"}, "kind must be"),
        ({"granularity": 0}, "granularity"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"layers": 0}, "layers"),
    ],
)
def test_bad_arguments_name_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        KVLayout.uniform(**{"layers": 1, "kv_heads": 1, "head_dim": 8, "max_len": 8, **options})
