"""The examples and the real model: what a new user runs first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from vattn import CACHE_KEYWORD, VirtualCache
from vattn.cli import command, demo
from vattn.models.versions import VERSION

ROOT = Path(__file__).parents[1]


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_growing_kv():
    out = run(str(ROOT / "examples" / "growing_kv.py"))
    assert "attention over 160 positions: (1, 32, 1, 128), finite: True" in out
    assert "took over slot 1, which was parked" in out


@pytest.mark.gpu
def test_growing_kv_prints_the_same_on_both_backends():
    script = str(ROOT / "examples" / "growing_kv.py")
    assert run(script, "cpu") == run(script, "cuda")


@pytest.mark.thorough
@pytest.mark.model
def test_hf_generate(folder):
    out = run(str(ROOT / "examples" / "hf_generate.py"), str(folder))
    assert "The capital of France is Paris" in out
    assert "slot 1 running" in out


@pytest.mark.thorough
@pytest.mark.model
def test_chat_reuses_its_cache(folder):
    out = run(str(ROOT / "examples" / "chat.py"), str(folder), "What is 2+2?", "And one more?")
    first, second = [line for line in out.splitlines() if "were in the cache" in line]
    assert first.startswith("[0 of ")
    known, total = second[1:].split(" prompt")[0].split(" of ")
    assert 0 < int(known) < int(total)


@pytest.mark.thorough
@pytest.mark.model
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_real_model_is_exact(folder, attention):
    model, tokenizer = demo.load(folder)
    model.set_attn_implementation(attention)
    chats = ["Write a haiku about memory.", "List three prime numbers."]
    inputs = tokenizer(chats, return_tensors="pt", padding=True)
    one = tokenizer(chats[0], return_tensors="pt")
    for batch, options in (
        (inputs, {}),
        (inputs, {"num_beams": 3}),
        (inputs, {"do_sample": True, "num_return_sequences": 2}),
        (one, {"prompt_lookup_num_tokens": 4}),
    ):
        tokens = []
        for cache in (DynamicCache(config=model.config), VirtualCache(model.config, max_len=256)):
            torch.manual_seed(0)
            tokens.append(
                model.generate(
                    **batch, **{CACHE_KEYWORD: cache}, **{"max_new_tokens": 20, "do_sample": False, **options}
                )
            )
        assert torch.equal(*tokens), options


@pytest.mark.thorough
@pytest.mark.model
def test_demo(folder, capsys):
    assert command.main(["demo", "Name a colour.", "--max-new-tokens", "12", "--max-len", "1024"]) == 0
    out = capsys.readouterr().out
    serves = VERSION >= (5, 17)
    assert out.count("the tokens are the same") == 1 + serves
    assert "StaticCache of 1024" in out
    assert ("eight reservations of 1024" in out) == serves
    assert out.count("\nA: ") == 1 + 8 * serves


@pytest.mark.thorough(1)
@pytest.mark.parametrize("name", ["chat.py", "hf_generate.py"])
def test_examples_say_what_they_want(name):
    done = subprocess.run([sys.executable, ROOT / "examples" / name], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "MODEL_FOLDER" in done.stderr
    assert "Traceback" not in done.stderr
