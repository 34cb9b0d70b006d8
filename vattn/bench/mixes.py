"""Mixes of requests that an engine is measured with: token ids of prompts, and how many tokens are sampled behind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vattn.bench import trace


@dataclass(frozen=True)
class Work:
    """One request.

    Args:
        prompt: token ids.
        output: tokens that are sampled.
    """

    prompt: list[int]
    output: int


def _nano(chance: random.Random, count: int, most: int) -> list[Work]:
    """The mix of nano-vllm's ``bench.py``: 100 to 1024 tokens of prompts and of outputs."""
    prompts = [[chance.randint(0, most) for _ in range(chance.randint(100, 1024))] for _ in range(count)]
    return [Work(prompt, chance.randint(100, 1024)) for prompt in prompts]


def _like(dataset: str) -> Callable[[random.Random, int, int], list[Work]]:
    def made(chance: random.Random, count: int, most: int) -> list[Work]:
        requests = trace.generate(dataset, count, seed=chance.randrange(2**32))
        return [Work([chance.randint(0, most) for _ in range(each.prompt)], each.output) for each in requests]

    return made


def _prefixes(chance: random.Random, count: int, most: int) -> list[Work]:
    """Groups of 16 requests that begin with the same 2048 tokens, with 128 tokens of their own and 256 to sample."""
    found: list[Work] = []
    while len(found) < count:
        system = [chance.randint(0, most) for _ in range(2048)]
        questions = [[chance.randint(0, most) for _ in range(128)] for _ in range(min(16, count - len(found)))]
        found += [Work([*system, *question], 256) for question in questions]
    chance.shuffle(found)
    return found


def _long(chance: random.Random, count: int, most: int) -> list[Work]:
    """Prompts of 8192, 32,768 and 120,000 tokens in turns, with 128 to sample."""
    lengths = (8192, 32768, 120_000)
    return [Work([chance.randint(0, most) for _ in range(lengths[i % 3])], 128) for i in range(count)]


MIXES: dict[str, tuple[Callable[[random.Random, int, int], list[Work]], int]] = {
    "nano": (_nano, 256),
    "sharegpt": (_like("sharegpt"), 400),
    "arxiv": (_like("arxiv"), 100),
    "prefixes": (_prefixes, 1024),
    "long": (_long, 6),
}
"""By name, what makes a mix, and how many requests it has unless another number is given."""


def mix(name: str, vocabulary: int, *, count: int | None = None, seed: int = 0) -> list[Work]:
    """Makes a mix of requests.

    Args:
        name: a key of ``MIXES``.
        vocabulary: token ids are below it, and at most 10,000.
        count: requests; None is what the mix has.
        seed: the same seed gives the same requests.

    Raises:
        ValueError: there is no such mix.
    """
    if name not in MIXES:
        raise ValueError(f"mix {name!r} is not known: use one of {', '.join(MIXES)}")
    make, usual = MIXES[name]
    return make(random.Random(seed), usual if count is None else count, min(10_000, vocabulary - 1))


def write(path: Path, works: Iterable[Work]) -> None:
    """Writes requests as JSON lines with ``prompt`` and ``output``, which other engines can be measured with."""
    path.write_text("".join(json.dumps({"prompt": work.prompt, "output": work.output}) + "\n" for work in works))


def read(path: Path) -> list[Work]:
    """Reads what ``write`` has written.

    Raises:
        ValueError: a line is no request; the message names it.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            fields = json.loads(line)
            work = Work([int(token) for token in fields["prompt"]], int(fields["output"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a request with prompt and output: {error}") from None
        if not work.prompt or work.output < 1:
            raise ValueError(f"{path}, line {number}: prompt must not be empty, and output must be at least 1")
        found.append(work)
    return found
