"""Whether the tests notice faults: small changes to the code, drawn by a seed, each of which some test has to fail on.

``mutants``: changes that were tried; ``mutants_caught``: the part of them that a test fails on.

    python bench/mutants.py --seed 0 --count 40 --out bench/results

A change turns a comparison, a connective, a sign or a number into another one, or drops a statement. Each is made in a
copy of the repository and tried on the tests of its part first; one that none of these catches is tried on all tests
that are usual.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report

_CORE = ("test_arena_stateful", "test_arena", "test_sharing", "test_prefix", "test_swap", "test_ahead", "test_threads")
# The files that are changed, and the tests of each, those first that most likely fail.
FILES = {
    "csrc/arena.cpp": _CORE,
    "csrc/sharing.cpp": _CORE,
    "csrc/reclaim.cpp": _CORE,
    "vattn/hf/padding.py": ("test_padding", "test_hf", "test_capture"),
    "vattn/hf/beams.py": ("test_hf_sharing", "test_hf_exact"),
    "vattn/memory/prefix_tree.py": ("test_prefix",),
    "vattn/memory/prefix_cache.py": ("test_prefix", "test_threads", "test_interrupts"),
    "vattn/engine/scheduler.py": ("test_scheduler", "test_preemption", "test_engine", "test_engine_memory"),
    "vattn/hf/step_call.py": ("test_decode", "test_capture", "test_hf"),
    "vattn/hf/step_rows.py": ("test_decode", "test_capture", "test_padding"),
}
SWAPS = {
    "<": ("<=",), "<=": ("<",), ">": (">=",), ">=": (">",), "==": ("!=",), "!=": ("==",),
    "&&": ("||",), "||": ("&&",), "and": ("or",), "or": ("and",), "+": ("-",), "-": ("+",),
    "0": ("1",), "1": ("0", "2"), "true": ("false",), "false": ("true",), "True": ("False",), "False": ("True",),
    "min": ("max",), "max": ("min",), "continue": ("break",), "break": ("continue",), "not": ("",), "+=": ("-=",),
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A change of a file: at ``begin`` up to ``end``, ``new`` stands in the place of ``old``."""

    file: str
    line: int
    begin: int
    end: int
    old: str
    new: str

    def applied(self, text: str) -> str:
        assert text[self.begin : self.end] == self.old
        return text[: self.begin] + self.new + text[self.end :]


def mutants_of(file: str, text: str) -> Iterator[Mutant]:
    """All changes of a file that are tried."""
    for begin, end in tokens_of(file, text):
        for new in SWAPS.get(old := text[begin:end], ()):
            yield Mutant(file, text.count("\n", 0, begin) + 1, begin, end, old, new)
    for found in re.finditer(r"^( +)(?!return|raise|throw|const|auto|using|yield)[\w.\->\[\]]+\(.*\);?$", text, re.M):
        if not found[0].rstrip().endswith(("{", ":", ",")) and found[0].count("(") == found[0].count(")"):
            dropped = found[1] + (";" if file.endswith("cpp") else "pass")
            yield Mutant(file, text.count("\n", 0, found.start()) + 1, found.start(), found.end(), found[0], dropped)


def tokens_of(file: str, text: str) -> Iterator[tuple[int, int]]:
    """Where the tokens of a file are, but for comments and texts."""
    if file.endswith("cpp"):
        pattern = (
            r'//[^\n]*|"(?:\\.|[^"\\])*"|#include[^\n]*|<[\w:, ]+>|&&|\|\||[<>=!+\-*/]=|->|<<|>>|\+\+|--|\w+|[<>+\-]'
        )
        for found in re.finditer(pattern, text):
            yield found.span()
        return
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.OP, tokenize.NAME, tokenize.NUMBER):
            yield starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1]


def drawn(count: int, seed: int) -> list[Mutant]:
    """So many changes, as many of each file, in turns."""
    chance = random.Random(seed)
    pools = {file: list(mutants_of(file, (report.ROOT / file).read_text())) for file in FILES}
    for pool in pools.values():
        chance.shuffle(pool)
    chosen: list[Mutant] = []
    cores = [file for file in FILES if file.startswith("csrc")]
    others = [file for file in FILES if not file.startswith("csrc")]
    for number in range(count):  # half of them are of the core
        names = cores if number % 2 else others
        pool = pools[names[number // 2 % len(names)]]
        if pool:
            chosen.append(pool.pop())
    return chosen


def tried(mutant: Mutant, copy: Path, *, all_usual: bool) -> dict[str, Any]:
    """What the tests say to a change, which is made in a copy of the repository and taken back."""
    path = copy / mutant.file
    text = path.read_text()
    row = {"file": mutant.file, "line": mutant.line, "was": mutant.old.strip(), "is": mutant.new.strip()}
    try:
        path.write_text(mutant.applied(text))
        if mutant.file.startswith("csrc") and not build(copy):
            return {**row, "caught by": "the compiler"}
        of_part = [f"tests/{name}.py" for name in FILES[mutant.file]]
        for tests in (of_part, ["--usual"]) if all_usual else (of_part,):
            if (found := failure(copy, tests)) is not None:
                return {**row, "caught by": found}
        return {**row, "caught by": None}
    finally:
        path.write_text(text)


def build(copy: Path) -> bool:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=copy, capture_output=True, check=False).returncode == 0


def failure(copy: Path, tests: list[str]) -> str | None:
    """The test that fails first; None where all pass."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-n",
        "2",
        "--timeout",
        "120",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}
    try:
        done = subprocess.run(
            command, cwd=copy, capture_output=True, text=True, env=environment, timeout=900, check=False
        )
    except subprocess.TimeoutExpired:
        return "the time limit"
    if done.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return found[1] if found else f"the end of the process ({done.returncode})"


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--part", action="store_true", help="try the tests of the part alone, which says more sooner")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "vattn"
        shutil.copytree(report.ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "build", "dist", ".*"))
        if not build(copy):
            raise SystemExit("the core cannot be built")
        if not options.part and (failed := failure(copy, ["--usual"])) is not None:
            raise SystemExit(f"{failed} fails without a change, too")
        for mutant in drawn(options.count, options.seed):
            rows.append(tried(mutant, copy, all_usual=not options.part))
            print(json.dumps(rows[-1]), flush=True)
    caught = sum(row["caught by"] is not None for row in rows)
    report.write("mutants", "cpu", rows, {"mutants": len(rows), "mutants_caught": caught / len(rows)}, options.out)


if __name__ == "__main__":
    main()
