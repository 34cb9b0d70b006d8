"""``PromptFile``: the prompts of a file, and the file of their answers, which grows while they are answered."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from vattn.cli.served import llm_of, params_of
from vattn.engine.intake import content_of
from vattn.engine.llm import LLM, chat_token_ids
from vattn.engine.outputs import RequestOutput
from vattn.engine.sampling_params import SamplingParams

_BEGIN = b'{"index": '  # of each line of answers
_KEYS = ("prompt", "prompt_token_ids", "messages")


@dataclass(frozen=True)
class Answered:
    """What a call has done.

    Args:
        prompts: prompts in the file.
        before: those that an earlier call had answered.
        answered: those that this call has answered.
        failed: those that this call could not answer; their lines say why.
        output_tokens: tokens that this call has computed.
        seconds: that it took.
    """

    prompts: int
    before: int
    answered: int
    failed: int
    output_tokens: int
    seconds: float


class PromptFile:
    """The prompts of a file, and the file of their answers.

    Args:
        prompts: a text file with a prompt in each line; or, with the ending ``.jsonl``, JSON lines with ``prompt`` (a
            text), ``prompt_token_ids`` or ``messages`` (a conversation). Empty lines are left out.
        answers: JSON lines with the ``index`` and the ``prompt`` of an answer, and its ``outputs`` or an ``error``, in
            the order in which they come. Prompts that it holds already are not answered again.

    Raises:
        OSError: a file cannot be read.
        ValueError: a line is no prompt, or ``answers`` holds those of other prompts.
    """

    def __init__(self, prompts: Path, answers: Path) -> None:
        self.prompts = list(_read_prompts(prompts))
        self._answers = answers
        self._done = self._read_answers() if answers.exists() else set()

    def _read_answers(self) -> set[int]:
        """The indices of prompts that are answered. A last line that was written halfway is cut off."""
        content = self._answers.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        done = set()
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                answer = json.loads(line)
                index = range(len(self.prompts))[answer["index"]]
                same = self.prompts[index] == answer["prompt"]
            except (ValueError, TypeError, LookupError):
                same = False
            if not same:
                raise ValueError(f"{self._answers}, line {number}, is no answer to these prompts: name another file")
            done.add(index)
        if torn := content[len(whole) :]:
            if not torn.startswith(_BEGIN[: len(torn)]):
                raise ValueError(f"{self._answers} ends with a line that is no answer: name another file")
            with self._answers.open("r+b") as file:
                file.truncate(len(whole))
        return done

    @property
    def left(self) -> list[int]:
        """The indices of prompts that are not answered yet."""
        return [index for index in range(len(self.prompts)) if index not in self._done]

    def nothing_left(self) -> Answered:
        """What a call has done that had nothing to do."""
        count = len(self.prompts)
        return Answered(prompts=count, before=count, answered=0, failed=0, output_tokens=0, seconds=0.0)

    def answer(
        self, llm: LLM, params: SamplingParams, *, at_once: int, progress: Callable[[int], object] = lambda count: None
    ) -> Answered:
        """Answers the prompts that are not answered yet.

        Args:
            llm: answers them; nobody else uses it.
            params: for all prompts.
            at_once: requests that the engine holds, at most; more than it computes at once.
            progress: is told after each answer how many there are now.
        """
        start, engine = time.perf_counter(), llm.engine
        waiting = self.left
        before, failed, tokens = len(self._done), 0, 0
        left = iter(waiting)
        with self._answers.open("a", encoding="utf-8") as file:

            def write(index: int, result: dict[str, Any]) -> None:
                line = {"index": index, "prompt": self.prompts[index], **result}
                file.write(json.dumps(line) + "\n")
                file.flush()
                self._done.add(index)
                progress(len(self._done))

            while True:
                while engine.unfinished < at_once and (index := next(left, None)) is not None:
                    try:
                        engine.add(str(index), _content(llm, self.prompts[index]), params)
                    except Exception as error:  # also whatever a chat template raises: one prompt fails, not all
                        write(index, {"error": str(error)})
                        failed += 1
                if not engine.unfinished:
                    break
                for output in engine.step():
                    if output.finished:
                        write(int(output.request_id), _result(output))
                        failed += output.error is not None
                        tokens += sum(len(each.token_ids) for each in output.outputs)
        return Answered(
            prompts=len(self.prompts),
            before=before,
            answered=len(waiting) - failed,
            failed=failed,
            output_tokens=tokens,
            seconds=time.perf_counter() - start,
        )


def _read_prompts(path: Path) -> Iterator[Any]:
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield line
            continue
        try:
            prompt = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, is no JSON: {error}") from error
        if not isinstance(prompt, dict) or sum(key in prompt for key in _KEYS) != 1:
            raise ValueError(f"{path}, line {number}, must be an object with one of {', '.join(_KEYS)}")
        yield prompt


def _content(llm: LLM, prompt: Any) -> Any:
    """The text or the token ids of a prompt."""
    if isinstance(prompt, dict) and "messages" in prompt:
        return chat_token_ids(llm.get_tokenizer(), prompt["messages"])
    return content_of(prompt)


def _result(output: RequestOutput) -> dict[str, Any]:
    if output.error is not None:
        return {"error": output.error}
    names = ("text", "finish_reason", "stop_reason")
    return {
        "outputs": [
            {**{name: getattr(each, name) for name in names}, "tokens": len(each.token_ids)} for each in output.outputs
        ]
    }


def summary(result: Answered) -> tuple[dict[str, Any], str]:
    """The result as JSON and as text."""
    speed = result.output_tokens / result.seconds if result.seconds else 0.0
    text = f"{result.answered} of {result.prompts} prompts answered"
    text += f", {result.before} by an earlier call" if result.before else ""
    text += f", {result.failed} failed" if result.failed else ""
    text += f": {result.output_tokens} tokens in {result.seconds:.1f} s, {speed:.1f} tokens/s"
    return {**asdict(result), "tokens_per_second": speed}, text


def run(options: Namespace) -> tuple[dict[str, Any], str]:
    """``vattn generate``; see ``vattn.cli.command``."""
    file = PromptFile(options.prompts, options.out)
    if not file.left:
        return summary(file.nothing_left())
    with llm_of(options) as llm, tqdm(total=len(file.prompts), desc="prompts", disable=not sys.stderr.isatty()) as bar:
        result = file.answer(
            llm,
            params_of(options, llm),
            at_once=4 * options.max_num_seqs,
            progress=lambda count: bar.update(count - bar.n),
        )
    return summary(result)
