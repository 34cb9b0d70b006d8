"""Whether the engine's tokens are those of ``generate``, what it does under pressure, and how fast it is on a CPU.

``exact_architectures``: tiny models of architectures of which every mode gives the greedy tokens of ``generate``, and
seeds the same tokens alone and among others; ``exact_modes``: pairs of an architecture and a mode that were compared;
``pressure_requests``: requests on a tenth of the memory that they ask for, with aborts, deadlines, resizes and failing
calls of the driver, which each ended once, with all memory given back; ``batch_speedup_cpu``: tokens per second of
eight prompts of SmolLM2 at once over one by one.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from typing import Any

import report
import torch

sys.path.insert(0, str(report.ROOT / "tests"))

import serving as trials

from vattn.cli import command, demo
from vattn.engine import LLM, SamplingParams
from vattn.errors import Error

TRANSFORMERS = [
    *("llama-gqa", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi3", "gpt_oss"),
    *("qwen3_moe", "deepseek_v3", "falcon", "bloom"),
]
GREEDY = SamplingParams(temperature=0, max_tokens=24)


def alone(engine: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [trials.tokens(trials.served(engine, [prompt], GREEDY))[0] for prompt in prompts]


def at_once(engine: Any, prompts: list[list[int]]) -> list[list[int]]:
    return trials.tokens(trials.served(engine, prompts, GREEDY))


def behind_a_prefix(engine: Any, prompts: list[list[int]]) -> list[list[int]]:
    for prompt in prompts:
        trials.served(engine, [prompt[: -len(prompt) // 3]], GREEDY)
    return at_once(engine, prompts)


def preempted(engine: Any, prompts: list[list[int]]) -> list[list[int]]:
    return trials.preempting(engine, prompts, GREEDY)


# By name: what computes the tokens, and the options of the engine. Models with states have no prefixes and no swap.
MODES: dict[str, tuple[Any, dict[str, Any]]] = {
    "alone": (alone, {}),
    "batched": (at_once, {}),
    "chunked": (at_once, {"max_num_batched_tokens": 16}),
    "behind a prefix": (behind_a_prefix, {}),
    "computed again": (preempted, {"preemption": "recompute"}),
    "swapped": (preempted, {"preemption": "swap"}),
}
FOR_ALL = ("alone", "batched", "chunked", "computed again")


def seeded(model: Any, prompt: list[int]) -> bool:
    """Whether three samples of a prompt, which are forks of it, are the same alone and among thirty others."""
    params = SamplingParams(n=3, temperature=0.9, top_p=0.95, seed=11, max_tokens=16)
    with trials.engine_of(model, max_num_seqs=40) as engine:
        [first] = trials.served(engine, [prompt], params)
        for number in range(30):
            other = SamplingParams(temperature=1.2, seed=number, max_tokens=16)
            engine.add(f"other {number}", trials.prompts_of((3 + number,))[0], other)
        engine.add("again", prompt, params)
        again = None
        while engine.unfinished:
            for output in engine.step():
                if output.request_id == "again":
                    again = output
    return again is not None and [o.token_ids for o in again.outputs] == [o.token_ids for o in first.outputs]


def exactness(name: str, model: Any, prompts: list[list[int]], **more: Any) -> list[dict[str, Any]]:
    expected = trials.generated(model, prompts, 24)
    rows = []
    for mode, (run, options) in MODES.items():
        with trials.engine_of(model, **{**more, **options}) as engine:
            if engine.tier.name == "rows" and mode not in FOR_ALL:
                continue
            equal = run(engine, prompts) == expected
        rows.append({"model": name, "tier": engine.tier.name, "mode": mode, "equal": equal})
    rows.append({"model": name, "tier": engine.tier.name, "mode": "seeds", "equal": seeded(model, prompts[0])})
    for row in rows:
        print(row, flush=True)
    return rows


def pressure(count: int) -> dict[str, Any]:
    """Requests on a tenth of what they ask for; returns how they ended."""
    model = trials.model_of("llama-gqa")
    chance = random.Random(1)
    asked = [(chance.randrange(1, 80), chance.randrange(1, 60), chance.choice([1, 1, 1, 2])) for _ in range(count)]
    each = statistics.mean(prompt + n * new for prompt, new, n in asked)
    ended: dict[str, int] = {}
    with trials.engine_of(model, max_num_seqs=64, kv_budget=64 << 20) as engine:
        cache = engine.tier.cache
        budget = int(0.1 * 64 * each * cache.layout.bytes_per_token)
        engine.resize(budget)
        seen: set[str] = set()
        waiting = list(enumerate(asked))
        steps = 0
        while waiting or engine.unfinished:
            steps += 1
            while waiting and engine.unfinished < 64:
                number, (prompt, new, n) = waiting.pop()
                ids = [chance.randrange(3, 99) for _ in range(prompt)]
                deadline = 0.2 if chance.random() < 0.02 else None
                params = SamplingParams(temperature=1, n=n, max_tokens=new, seed=number, deadline=deadline)
                engine.add(str(number), ids, params)
            if chance.random() < 0.02:
                engine.abort(str(chance.randrange(count)))
            if chance.random() < 0.02:
                engine.resize(int(budget * chance.uniform(0.7, 1.3)))
            if steps % 7 == 0:
                cache.driver.fail_at(chance.randrange(1, 4))
            try:
                outputs = engine.step()
            except Error:
                outputs = []
            cache.driver.fail_at(0)
            for output in outputs:
                if output.finished:
                    assert output.request_id not in seen
                    seen.add(output.request_id)
                    for one in output.outputs:
                        ended[str(one.finish_reason)] = ended.get(str(one.finish_reason), 0) + 1
        assert len(seen) == count
        counters = engine.scheduler.requests.counters
        assert counters.submitted == counters.finished + counters.aborted + counters.failed == count
        cache.check()
        assert cache.stats().running_slots == 0
        cache.trim()
        assert cache.stats().physical == 0
    return {"requests": len(seen), "budget": budget, "preemptions": counters.preemptions, **ended}


def speed() -> dict[str, Any]:
    """Eight prompts of SmolLM2 at once, and one by one, in rounds."""
    model, tokenizer = demo.load(command.default_folder())
    prompts = [
        *("The capital of France is", "Once upon a time", "Water boils at", "The largest planet is"),
        *("In 1969", "A prime number is", "My favourite food is", "The sea is"),
    ]
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    with LLM(model, tokenizer, max_model_len=1024, kv_budget=1 << 30) as llm:
        times: dict[str, list[float]] = {"at once": [], "one by one": []}
        for turn in range(4):
            for name, batches in (("at once", [prompts]), ("one by one", [[prompt] for prompt in prompts])):
                start = time.perf_counter()
                for batch in batches:
                    llm.generate(batch, params, use_tqdm=False)
                if turn:  # the first one warms up
                    times[name].append(len(prompts) * 48 / (time.perf_counter() - start))
    return {f"tokens/s {name}": statistics.median(each) for name, each in times.items()}


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000)
    options = parser.parse_args()
    fast = speed()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    prompts = trials.prompts_of((30, 7, 12, 45))
    for name in [*TRANSFORMERS, *trials.HYBRIDS]:
        rows += exactness(name, trials.model_of(name), prompts)
    models = {row["model"] for row in rows}
    exact = [name for name in models if all(row["equal"] for row in rows if row["model"] == name)]
    real, _ = demo.load(command.default_folder())
    real.generation_config.eos_token_id = None
    rows += exactness("SmolLM2, its weights", real, prompts[:2], granularity=1 << 21, kv_budget=1 << 30)
    pressed = pressure(options.requests)
    bars = {
        "exact_architectures": len(exact),
        "exact_modes": sum(row["equal"] for row in rows),
        "pressure_requests": pressed["requests"],
        "batch_speedup_cpu": fast["tokens/s at once"] / fast["tokens/s one by one"],
    }
    report.write("engine", "cpu", [*rows, pressed, fast], bars, options.out)


if __name__ == "__main__":
    main()
