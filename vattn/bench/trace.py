"""Traces of requests to a server: generated from published length statistics, or read from a JSON-lines file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        arrival: seconds after the start of the trace.
        prompt: tokens of the prompt.
        output: tokens that are generated one by one.
    """

    arrival: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Moments:
    """The median and the 90th percentile of the tokens of a dataset's prompts and outputs, and their source."""

    prompt: tuple[int, int]
    output: tuple[int, int]
    source: str


# Table 2 of Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024.
_SARATHI = "Sarathi-Serve (OSDI 2024), table 2"
DATASETS = {
    "sharegpt": Moments((1730, 5696), (415, 834), f"openchat_sharegpt4, {_SARATHI}"),
    "arxiv": Moments((7059, 12985), (208, 371), f"arxiv_summarization, {_SARATHI}"),
}
_P90 = 1.2815515655446004  # the normal distribution's 90th percentile, in standard deviations


def generate(dataset: str, count: int, *, rate: float = math.inf, longest: int = 16384, seed: int = 0) -> list[Request]:
    """Generates requests with log-normal lengths that have a dataset's median and 90th percentile.

    Args:
        dataset: a key of ``DATASETS``.
        count: number of requests.
        rate: requests per second, with exponentially distributed gaps; infinite: all arrive at the start.
        longest: the most tokens of a prompt and its output together; longer ones are cut.
        seed: the same seed gives the same requests.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset {dataset!r} is not known: use one of {', '.join(DATASETS)}")
    if longest < 2:
        raise ValueError(f"longest must be at least 2, not {longest}")
    source = random.Random(seed)
    moments = DATASETS[dataset]
    requests, now = [], 0.0
    for _ in range(count):
        prompt, output = (
            max(1, round(source.lognormvariate(math.log(median), math.log(p90 / median) / _P90)))
            for median, p90 in (moments.prompt, moments.output)
        )
        prompt = min(prompt, longest - 1)
        requests.append(Request(now, prompt, min(output, longest - prompt)))
        now += source.expovariate(rate) if math.isfinite(rate) else 0.0
    return requests


def read(path: Path) -> list[Request]:
    """Reads a JSON-lines file with ``arrival``, ``prompt`` and ``output`` in each line; sorts requests by arrival.

    Raises:
        ValueError: a line is no request; the message names it.
    """
    requests = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            request = Request(float(fields["arrival"]), int(fields["prompt"]), int(fields["output"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is not a request with arrival, prompt and output: {error}"
            ) from None
        if request.arrival < 0 or request.prompt < 1 or request.output < 1:
            raise ValueError(f"{path}, line {number}: arrival must not be negative, prompt and output at least 1")
        requests.append(request)
    return sorted(requests, key=lambda request: request.arrival)


def write(path: Path, requests: Iterable[Request]) -> None:
    """Writes requests to a file in the format that ``read`` takes."""
    path.write_text("".join(json.dumps(asdict(request)) + "\n" for request in requests))
