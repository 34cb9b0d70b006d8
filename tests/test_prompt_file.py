"""``vattn generate``: a file of prompts, answered as ``LLM`` answers them; stopped calls go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import saved

from vattn import LLM, SamplingParams
from vattn.cli import command
from vattn.engine.engine import Engine
from vattn.models.versions import VERSION

pytestmark = pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")

PROMPTS = ["w5 w17 w33", "w80", "w9 w9 w4 w7", "w11 w12", "w50 w51 w52 w53 w54"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a small model and its tokenizer."""
    return saved(tmp_path_factory.mktemp("model"))


def expected(folder: Path, prompts: list[Any]) -> list[str]:
    with LLM(str(folder), kv_budget=64 << 20) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
        return [output.outputs[0].text for output in outputs]


def run(folder: Path, prompts: Path, out: Path, *more: str) -> int:
    options = ["--max-tokens", "12", "--temperature", "0", "--kv-budget", "64MiB", "--max-num-seqs", "1", *more]
    return command.main(["generate", str(folder), str(prompts), "--out", str(out), *options])


def texts(out: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({line["index"] for line in lines}) == len(lines)
    return {line["index"]: line["outputs"][0]["text"] for line in lines}


def test_a_file_of_texts(folder, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers"
    prompts.write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:], "  "]))
    assert run(folder, prompts, out, "--json") == 0
    assert texts(out) == dict(enumerate(expected(folder, PROMPTS)))
    printed = json.loads(capsys.readouterr().out)
    assert (printed["prompts"], printed["answered"], printed["before"], printed["failed"]) == (5, 5, 0, 0)
    assert printed["output_tokens"] == 60
    assert run(folder, prompts, out) == 0
    assert "0 of 5 prompts answered, 5 by an earlier call" in capsys.readouterr().out


def test_json_lines_and_a_prompt_that_cannot_be_answered(folder, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers"
    chat = [{"role": "user", "content": "w7\u2028w8"}]
    lines = [
        {"prompt": PROMPTS[0]},
        {"messages": [{"role": "nobody", "content": "w3"}]},
        {"prompt_token_ids": [500]},
        {"prompt_token_ids": [5, 17, 33]},
        {"messages": chat},
    ]
    prompts.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert run(folder, prompts, out, "--n", "1") == 0
    assert "3 of 5 prompts answered, 2 failed: 36 tokens" in capsys.readouterr().out
    answers = {line["index"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert answers[1]["error"] == "the chat template refuses the messages: who?"
    assert "a token of prompt must be at most 100" in answers[2]["error"]
    found = [answers[index]["outputs"][0]["text"] for index in (0, 3, 4)]
    assert found == expected(folder, [PROMPTS[0], [5, 17, 33], [1, 7, 8, 2]])


@pytest.mark.parametrize("torn", [False, True])
def test_a_call_that_was_stopped_goes_on(folder, tmp_path, monkeypatch, capsys, torn):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers"
    prompts.write_text("\n".join(PROMPTS))
    step, steps = Engine.step, []

    def stopped(self: Engine) -> Any:
        steps.append(1)
        if len(steps) == 30:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "step", stopped)
        assert run(folder, prompts, out) == 130
    before = texts(out)
    assert 0 < len(before) < 5
    if torn:  # the machine stopped while a line was written
        with out.open("a") as file:
            file.write('{"index": 4, "prompt": "w5')
    assert run(folder, prompts, out) == 0
    assert f"{5 - len(before)} of 5 prompts answered, {len(before)} by an earlier call" in capsys.readouterr().out
    assert texts(out) == dict(enumerate(expected(folder, PROMPTS)))


@pytest.mark.parametrize(
    ("name", "content", "answers", "error"),
    [
        ("a.txt", "w1\nw2", '{"index": 1, "prompt": "w3", "outputs": []}\n', "line 1, is no answer to these prompts"),
        ("a.txt", "w1", '{"index": 1, "prompt": "w1", "outputs": []}\n', "line 1, is no answer to these prompts"),
        ("a.txt", "w1", "w1\n", "line 1, is no answer to these prompts"),
        ("a.txt", "w1", "notes of somebody", "ends with a line that is no answer"),
        ("a.jsonl", "{}", None, "line 1, must be an object with one of prompt, prompt_token_ids, messages"),
        ("a.jsonl", '{"prompt": "w1"}\n{', None, "line 2, is no JSON"),
    ],
)
def test_files_that_do_not_fit_are_left_alone(folder, tmp_path, capsys, name, content, answers, error):
    prompts, out = tmp_path / name, tmp_path / "answers"
    prompts.write_text(content)
    if answers is not None:
        out.write_text(answers)
    assert run(folder, prompts, out) == 1
    assert error in capsys.readouterr().err
    assert (out.read_text() if out.exists() else None) == answers
