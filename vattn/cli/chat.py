"""``Chat``: a conversation with a model, whose answers come as they are computed."""

from __future__ import annotations

import contextlib
import itertools
import sys
from argparse import Namespace
from collections.abc import Callable, Generator, Iterator
from typing import Any

from vattn.cli.served import llm_of, params_of
from vattn.engine.llm import LLM, chat_token_ids
from vattn.engine.outputs import RequestOutput
from vattn.engine.sampling_params import SamplingParams


class Chat:
    """A conversation with a model.

    Each turn begins behind the K and V of the turns before it, as far as the model's template writes these as before.

    Args:
        llm: answers; nobody else uses it.
        params: how its tokens are chosen.
        system: the first message, which tells the model how to answer; or None.

    Attributes:
        messages: of the conversation so far.
        last: the output of the last answer; None before the first.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self._llm, self._params = llm, params
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._first)
        self.last: RequestOutput | None = None
        self._turns = itertools.count()

    def reset(self) -> None:
        """Begins a new conversation."""
        self.messages = list(self._first)

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yields the parts of an answer as they come.

        A caller that stops to iterate, or Ctrl-C, ends the answer; what there is of it stays in the conversation.

        Args:
            text: what the user says.

        Raises:
            ValueError: the conversation cannot be answered, e.g. because it is too long. It is as before then.
            RuntimeError: the answer ended with an error. The conversation is as before.
        """
        engine, messages = self._llm.engine, [*self.messages, {"role": "user", "content": text}]
        name, shown, finished = f"turn-{next(self._turns)}", "", False
        ids = chat_token_ids(self._llm.get_tokenizer(), messages)
        try:
            engine.add(name, ids, self._params)
            while not finished:
                for output in engine.step():
                    if output.request_id != name:  # of a turn that was interrupted while it was added
                        continue
                    finished = output.finished
                    if output.error is not None:
                        raise RuntimeError(output.error)
                    self.last, new = output, output.outputs[0].text[len(shown) :]
                    shown += new
                    if new:
                        yield new
        except BaseException as error:
            engine.cancel([name])
            if isinstance(error, (GeneratorExit, KeyboardInterrupt)):
                self.messages = [*messages, {"role": "assistant", "content": shown}]
            raise
        self.messages = [*messages, {"role": "assistant", "content": shown}]


def converse(
    chat: Chat, lines: Iterator[str], write: Callable[[str], object], complain: Callable[[str], object]
) -> None:
    """Answers the lines of a user, until they end or one is ``/exit``; ``/reset`` begins a new conversation.

    Ctrl-C ends an answer, and between answers the conversation.

    Args:
        chat: answers.
        lines: what the user says.
        write: shows a part of an answer.
        complain: shows why there is no answer.
    """
    for line in lines:
        if not (text := line.strip()):
            continue
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            chat.reset()
            continue
        answer = chat.answer(text)
        try:
            for part in answer:
                write(part)
        except KeyboardInterrupt:
            answer.close()
        except (ValueError, RuntimeError) as error:
            complain(f"[{error}; /reset begins a new conversation]")
        write("\n")


def run(options: Namespace) -> tuple[dict[str, Any], str]:
    """``vattn chat``; see ``vattn.cli.command``."""
    typed = sys.stdin.isatty()
    with llm_of(options) as llm:
        chat = Chat(llm, params_of(options, llm), options.system)
        if typed and not options.json:
            print("Ctrl-C ends an answer, /reset begins anew, /exit ends.")
        write = (lambda part: None) if options.json else (lambda part: print(part, end="", flush=True))
        lines = _typed("" if options.json else "> ") if typed else sys.stdin
        converse(chat, lines, write, lambda error: print(error, file=sys.stderr))
    return {"messages": chat.messages}, ""


def _typed(prompt: str) -> Iterator[str]:
    """The lines that a user types behind a prompt, until Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lets lines be edited
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input(prompt)
