"""``LLM``: answers in the order of the prompts, options, weights, sleep."""

from __future__ import annotations

import pytest
import torch
from models import build
from serving import (
    GREEDY,
    NEW,
    engine_of,
    generated,
    llm_of,
    model_of,
    prompts_of,
    served,
    tokens,
)

from vattn.engine.llm import LLM
from vattn.engine.sampling_params import SamplingParams
from vattn.models.versions import VERSION

pytestmark = pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")


@pytest.mark.parametrize("name", ["llama-gqa", "Mamba2"])
def test_prefixes_are_forgotten_on_demand(name):
    """What was computed with other weights is never used again."""
    model = model_of(name)
    prompts = prompts_of((40, 9))
    with llm_of(model) as llm:
        for _ in range(2):
            before = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert before[0].num_cached_tokens == (39 if name == "llama-gqa" else 0)
        llm.engine.add("runs", prompts[1], GREEDY)
        for _ in range(3):
            llm.engine.step()
            assert not llm.reset_prefix_cache()
        llm.engine.abort("runs")
        while llm.engine.unfinished:
            llm.engine.step()
        model.load_state_dict({key: 1.1 * value for key, value in model.state_dict().items()})
        assert llm.reset_prefix_cache()
        after = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.num_cached_tokens for output in after] == [0, 0]
        assert tokens(after) == generated(model, prompts) != tokens(before)


@pytest.mark.parametrize("name", ["llama-gqa", "Mamba2"])
def test_weights_change_between_requests(name, tmp_path):
    model = model_of(name)
    prompts = prompts_of((40, 9))
    before = generated(model, prompts)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    with llm_of(model) as llm:
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == before
        llm.update_weights((key, 1.1 * value) for key, value in values.items())
        changed = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert tokens(changed) == generated(model, prompts) != before
        assert [output.num_cached_tokens for output in changed] == [0, 0]
        llm.update_weights(tmp_path / "before")
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == before
        key = next(iter(values))
        for bad, error in [
            ({"nothing": torch.zeros(1)}, "weights has 'nothing', which the model does not have"),
            ({key: torch.zeros(3)}, f"weights has '{key}' of the shape .3., and the model of"),
            ({key: 3}, f"weights has 3 as '{key}', which must be a tensor"),
            (3, "weights must be tensors by name, pairs of both or a folder, not 3"),
            ([3], "weights must be tensors by name, pairs of both or a folder"),
        ]:
            with pytest.raises((TypeError, ValueError), match=error):
                llm.update_weights(bad)
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == before


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_sleeps_holds_no_memory(level, device):
    model = model_of("llama-gqa", device)
    prompts = prompts_of((40, 9))
    expected = generated(model, prompts)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    with llm_of(model) as llm:
        llm.engine.add("runs", prompts[0], GREEDY)
        with pytest.raises(RuntimeError, match="1 requests have not ended"):
            llm.sleep()
        llm.engine.abort("runs")
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected
        for _ in range(2):
            llm.sleep(level)
        assert llm.engine.tier.cache.stats().physical == 0
        held = sum(parameter.untyped_storage().nbytes() for parameter in parameters)
        assert (held > 0) == (level == 1 and device == "cpu")
        with pytest.raises(RuntimeError, match="the engine sleeps"):
            llm.generate(prompts, GREEDY, use_tqdm=False)
        with pytest.raises(RuntimeError, match="the engine sleeps"):
            llm.update_weights(values)
        llm.wake_up()
        if level == 2:
            some, *others = values
            llm.update_weights({some: values[some]})
            with pytest.raises(RuntimeError, match="weights were discarded: call update_weights"):
                llm.generate(prompts, GREEDY, use_tqdm=False)
            llm.update_weights({name: values[name] for name in others})
        assert list(model.parameters()) == parameters
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected
        with pytest.raises(ValueError, match="level must be"):
            llm.sleep(3)
    with pytest.raises(ValueError, match="dtype must be 'auto' or the name of a floating-point dtype, not 'nope'"):
        LLM("/nowhere", dtype="nope")


def test_llm_answers_in_the_order_of_the_prompts():
    model = model_of("llama-gqa")
    prompts = prompts_of((20, 3, 31))
    expected = generated(model, prompts)
    with llm_of(model) as llm:
        report = llm.report()
        assert list(report.pop("startup s")) == ["probe", "kernels", "verify", "swap cost", "compile"]
        assert report == {
            "tier": "flat", "reason": None, "kernels": ["sdpa"], "graphs": 0,
            "uncaptured": "there are no CUDA graphs on cpu", "uncompiled": "compile is not set", "max_model_len": 160,
        }  # fmt: skip
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected
        assert tokens(llm.generate(prompts[0], GREEDY, use_tqdm=False)) == expected[:1]
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        each = [SamplingParams(temperature=0, max_tokens=number) for number in (1, 5, 9)]
        outputs = llm.generate(given, each, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 9]
        assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_llm_is_usable_after_an_interrupt_or_a_bad_prompt():
    model = model_of("llama-gqa")
    prompts = prompts_of((20, 3, 31))
    with llm_of(model) as llm:
        expected = tokens(llm.generate(prompts, GREEDY, use_tqdm=False))
        run, calls = llm.engine.tier.runner.run, []

        def interrupted(*given):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return run(*given)

        llm.engine.tier.runner.run = interrupted
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.engine.unfinished == 0
        assert llm.engine.tier.cache.stats().running_slots == 0
        with pytest.raises(ValueError, match="a token of prompt must be at most 100"):
            llm.generate([*prompts, [500]], GREEDY, use_tqdm=False)
        assert llm.engine.unfinished == 0
        for bad, error in [(3, "prompts must be"), ([{"text": "x"}], "prompt must have prompt or prompt_token_ids")]:
            with pytest.raises((TypeError, ValueError), match=error):
                llm.generate(bad, GREEDY, use_tqdm=False)
        with pytest.raises(ValueError, match="sampling_params are 1, and there are 3 prompts"):
            llm.generate(prompts, [GREEDY], use_tqdm=False)
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"policy": "best"}, "policy must be"),
        ({"kv_budget": 2.0}, "budget"),
        ({"depth": 2}, "depth"),
        ({"preemption": "never"}, "preemption must be"),
        ({"swap_space": -1}, "swap_space"),
        ({"swap_space": "4"}, "swap_space"),
        ({"nothing": 1}, "nothing"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype must be"),
        ({"gpu_memory_utilization": 0.0, "kv_budget": None}, "gpu_memory_utilization must be in"),
        ({"gpu_memory_utilization": 1e-9, "kv_budget": None}, "gpu_memory_utilization is 1e-09, and 0.* is in use"),
        ({"gpu_memory_utilization": 0.5}, "kv_budget and gpu_memory_utilization say the same"),
        ({"enable_chunked_prefill": False}, "enable_chunked_prefill must be True"),
        ({"tensor_parallel_size": 2}, "one GPU is all"),
        ({"quantization": "awq"}, "quantization is 'awq', and the model's is None"),
        ({"quantization": 5}, "quantization must be the name"),
        ({"dtype": torch.bfloat16}, "dtype is of a model that is loaded"),
        ({"device": "cuda:7"}, "device is of a model that is loaded"),
        ({"skip_tokenizer_init": True, "tokenizer": "/nope"}, "skip_tokenizer_init leaves out the tokenizer"),
        ({"generation_config": "mine"}, "generation_config must be"),
    ],
)
def test_bad_options_are_named(options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        llm_of(model_of("llama-gqa"), **options)


@pytest.mark.parametrize("name", ["/nowhere", "nobody/has-this-model", "../x y"])
def test_a_model_that_is_not_on_the_disk_is_named(name):
    with pytest.raises(FileNotFoundError, match=r"model .* is not on this machine"):
        LLM(name)
    with pytest.raises(FileNotFoundError, match=r"tokenizer .* is not on this machine"):
        LLM(model_of("llama-gqa"), name)


def test_kernels_are_reported():
    for name, options, kernels in [
        ("gemma2", {}, ["reference"]),
        ("llama-gqa", {"kv_cache_dtype": "fp8"}, ["reference", "sdpa"]),
    ]:
        with llm_of(model_of(name), **options) as llm:
            assert llm.report()["kernels"] == kernels
    with llm_of(model_of("Mamba2")) as llm:
        assert llm.report()["kernels"] == []


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="has an encoder"):
        llm_of(build("t5", "eager", "cpu"))
    with pytest.raises(TypeError, match="model must be a folder, a name or a model"):
        LLM(3)


def test_outputs_end_where_the_model_does():
    """vLLM's way: ``max_tokens`` beyond the longest sequence is cut."""
    model = model_of("llama-gqa")
    with engine_of(model, max_model_len=30) as engine:
        for max_tokens in (None, 500):
            [output] = served(engine, prompts_of((20,)), SamplingParams(temperature=0, max_tokens=max_tokens))
            assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (10, "length")
    with pytest.raises(ValueError, match="max_model_len is 300, and the model is made for 256 positions"):
        llm_of(model, max_model_len=300)
    with pytest.raises(ValueError, match=r"call model\.eval"):
        llm_of(model.train())


def test_weights_that_fail_halfway_leave_no_old_prefix(monkeypatch):
    model = model_of("llama-gqa")
    prompts = prompts_of((60,))
    with llm_of(model) as llm:
        llm.generate(prompts, GREEDY, use_tqdm=False)
        values = {key: 1.1 * value for key, value in model.state_dict().items()}
        last = list(values)[-1]

        class Broken(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                if function is torch.Tensor.copy_:
                    raise MemoryError("no")
                return super().__torch_function__(function, types, args, kwargs or {})

        with pytest.raises(MemoryError):
            llm.update_weights({**values, last: values[last].as_subclass(Broken)})
        [output] = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert output.num_cached_tokens == 0
        assert tokens([output]) == generated(model, prompts)


def test_a_close_that_is_refused_leaves_no_old_prefix():
    model = model_of("llama-gqa")
    prompts = prompts_of((60,))
    with llm_of(model) as llm:
        for number in range(2):
            llm.engine.add(str(number), prompts[0], GREEDY)
        for _ in range(4):
            llm.engine.step()
        llm.engine.tier.cache.driver.fail_at(1, times=8)
        llm.update_weights({key: 1.1 * value for key, value in model.state_dict().items()})
        llm.engine.tier.cache.driver.fail_at(0)
        while llm.engine.unfinished:
            llm.engine.step()
        [output] = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert tokens([output]) == generated(model, prompts)


def test_a_folder_that_lacks_a_weight_leaves_it_alone(tmp_path):
    model = model_of("llama-gqa")
    [name] = [name for name in model.state_dict() if "layers.1.mlp.up_proj" in name]
    before = model.state_dict()[name].clone()
    lacking = {key: value for key, value in model.state_dict().items() if key != name}
    model.save_pretrained(tmp_path, state_dict=lacking)
    with llm_of(model) as llm:
        llm.update_weights(str(tmp_path))
        assert torch.equal(model.state_dict()[name], before)
        with pytest.raises(FileNotFoundError, match="weights is '/nowhere/x', and there is no such folder"):
            llm.update_weights("/nowhere/x")


def test_weights_that_are_not_there_are_refused():
    model = model_of("llama-gqa")
    name, value = next(iter(model.state_dict().items()))

    def truncated():
        yield name, value
        raise OSError("the file is truncated")

    with llm_of(model) as llm:
        for weights, kind, error in [
            ({name: value.to("meta")}, TypeError, "must be a tensor with values"),
            ({name: value.long()}, TypeError, "in torch.int64, and the model in torch.float32"),
            (truncated(), OSError, "truncated"),
        ]:
            with pytest.raises(kind, match=error):
                llm.update_weights(weights)


def test_weights_of_several_tensors_go_and_come_back():
    quantization = pytest.importorskip("torchao.quantization")
    model = model_of("llama-gqa")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    prompts = prompts_of((20,))
    expected = generated(model, prompts)
    values = {key: value.detach().clone() for key, value in model.state_dict().items()}
    with llm_of(model) as llm:
        llm.sleep()
        llm.sleep(level=2)
        llm.wake_up()
        with pytest.raises(RuntimeError, match="weights were discarded"):
            llm.generate(prompts, GREEDY, use_tqdm=False)
        llm.update_weights(values)
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected


def test_an_engine_that_is_closed_while_it_sleeps_gives_the_weights_back(device):
    model = model_of("llama-gqa", device)
    prompts = prompts_of((20,))
    expected = generated(model, prompts)
    with llm_of(model) as llm:
        llm.sleep()
    assert generated(model, prompts) == expected


def test_defaults_of_a_greedy_model_are_those_of_generate():
    model = model_of("llama-gqa")
    model.generation_config.repetition_penalty = 3.0
    prompts = prompts_of((20,))
    with llm_of(model) as llm:
        assert llm.get_default_sampling_params().repetition_penalty == 3.0
        params = llm.get_default_sampling_params()
        params.max_tokens = NEW
        assert tokens(llm.generate(prompts, params, use_tqdm=False)) == generated(model, prompts)
    with llm_of(model, generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_prompts_may_be_tensors():
    model = model_of("llama-gqa")
    prompts = prompts_of((20, 9))
    with llm_of(model) as llm:
        given = [torch.tensor(prompt) for prompt in prompts]
        assert tokens(llm.generate(given, GREEDY, use_tqdm=False)) == generated(model, prompts)
        with pytest.raises(TypeError, match="priority must be a list of numbers, not 5"):
            llm.generate(prompts, GREEDY, priority=5)
        with pytest.raises(ValueError, match="priority are 1, and there are 2 prompts"):
            llm.generate(prompts, GREEDY, priority=[5])


@pytest.mark.parametrize(("policy", "early"), [("fcfs", True), ("priority", False)])
def test_the_first_iteration_begins_before_all_requests_are_there(policy, early, monkeypatch):
    model = model_of("llama-gqa")
    prompts = prompts_of((20,) * 6)
    with llm_of(model, max_num_batched_tokens=32, policy=policy) as llm:
        calls = []
        for name in ("add", "step"):
            plain = getattr(llm.engine, name)
            monkeypatch.setattr(llm.engine, name, lambda *a, _n=name, _p=plain, **k: calls.append(_n) or _p(*a, **k))
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == generated(model, prompts)
        expected = ["add", "add", "step", *["add"] * 4, "step"] if early else [*["add"] * 6, "step"]
        assert calls[: len(expected)] == expected
        with pytest.raises(ValueError, match="a token of prompt"):
            llm.generate([*prompts, [-1]], GREEDY, use_tqdm=False)
        assert llm.engine.unfinished == 0
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == generated(model, prompts)


def test_a_start_row_by_row():
    with llm_of(model_of("Mamba2")) as llm:
        assert list(llm.report()["startup s"]) == ["probe"]
