"""``vattn chat``: a conversation whose answers come as they are computed."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from models import saved

from vattn import LLM, SamplingParams
from vattn.cli import command
from vattn.cli.chat import Chat, converse
from vattn.engine.engine import Engine
from vattn.models.versions import VERSION

pytestmark = pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")

PARAMS = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture
def llm(folder):
    with LLM(str(folder), kv_budget=64 << 20, max_num_seqs=2) as llm:
        yield llm
        assert llm.engine.unfinished == 0


def expected(llm: LLM, messages: list[dict[str, str]]) -> str:
    return llm.chat(messages, PARAMS, use_tqdm=False)[0].outputs[0].text


def test_a_conversation_goes_on(llm):
    chat = Chat(llm, PARAMS, "w77")
    said = [{"role": "system", "content": "w77"}]
    for text in ("w5 w6", "w40", "w9 w9 w9"):
        said.append({"role": "user", "content": text})
        parts = list(chat.answer(text))
        assert len(parts) > 3
        assert "".join(parts) == expected(llm, said)
        said.append({"role": "assistant", "content": "".join(parts)})
        assert chat.messages == said
    chat.reset()
    assert chat.messages == said[:1]


def test_a_turn_begins_behind_those_before_it(llm):
    chat = Chat(llm, PARAMS)
    list(chat.answer("w5 w6 w7 w8"))
    before = len(chat.last.prompt_token_ids)
    list(chat.answer("w9"))
    assert chat.last.num_cached_tokens >= before - 2  # the template writes the end of a turn in another way


def test_an_answer_that_is_stopped_stays(llm):
    chat = Chat(llm, PARAMS)
    answer = chat.answer("w5 w6")
    some = next(answer) + next(answer)
    answer.close()
    assert [message["content"] for message in chat.messages] == ["w5 w6", some]
    assert llm.engine.unfinished == 0
    assert "".join(chat.answer("w3")) == expected(llm, chat.messages[:3])


def test_ctrl_c_ends_an_answer_alone(llm, monkeypatch):
    chat, written = Chat(llm, PARAMS), []
    step, steps = Engine.step, []

    def interrupted(self, **options):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(self, **options)

    monkeypatch.setattr(Engine, "step", interrupted)
    converse(chat, iter(["w5", "w6"]), written.append, pytest.fail)
    first, second = "".join(written).splitlines()
    assert 0 < len(first.split()) < 12
    assert [message["content"] for message in chat.messages] == ["w5", first, "w6", second]
    assert second == expected(llm, chat.messages[:3])


def test_ctrl_c_while_a_turn_is_added_answers_no_other(llm, monkeypatch):
    chat = Chat(llm, PARAMS)
    add = Engine.add

    def interrupted(self, *given, **options):
        add(self, *given, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(chat.answer("w5"))
    chat.reset()
    assert "".join(chat.answer("w9")) == expected(llm, [{"role": "user", "content": "w9"}])


def test_a_template_that_fails_is_told(llm):
    told = []
    llm.get_tokenizer().chat_template = "{{ raise_exception('no system') }}"
    converse(Chat(llm, PARAMS, "x"), iter(["w5"]), lambda part: None, told.append)
    assert told[0].startswith("[the chat template refuses the messages: no system")


def test_what_cannot_be_answered_is_told_and_left_out(llm, monkeypatch):
    chat, written, told = Chat(llm, PARAMS), [], []
    step, steps = Engine.step, []

    def failing(self):
        steps.append(1)
        if len(steps) == 4:
            raise RuntimeError("no")
        if len(steps) == 8:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", failing)
    lines = ["w5", "  ", " ".join(["w3"] * 300), "w6", "/reset", "w7", "/exit", "w8"]
    converse(chat, iter(lines), written.append, told.append)
    assert "[no; /reset begins" in told[0]
    assert "[prompt has 302 tokens, and max_model_len is 256; /reset begins" in told[1]
    assert len(told) == 2
    assert [message["content"] for message in chat.messages][:1] == ["w7"]
    assert llm.engine.unfinished == 0


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(folder, monkeypatch, capsys, as_json):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w5 w6\nw7\n"))
    options = ["--temperature", "0", "--max-tokens", "5", "--kv-budget", "64MiB", *["--json"] * as_json]
    assert command.main(["chat", str(folder), *options]) == 0
    out = capsys.readouterr().out
    if not as_json:
        assert [len(line.split()) for line in out.splitlines()] == [5, 5]
        return
    messages = json.loads(out)["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
