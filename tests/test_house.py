"""The code follows the tables of docs/design/house.md. These tests need no compiler, and do not import vattn."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from usual import unusual

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vattn"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
SOURCES = sorted((ROOT / "csrc").iterdir())
LINES, METHODS, ATTRIBUTES = 500, 25, 12
TORCHLESS = (
    "arguments.py",
    "errors.py",
    "memory/shape.py",
    "memory/configuration.py",
    "memory/layout.py",
    "memory/prefix_tree.py",
)
TORCHLESS += ("memory/ipc.py", "bench/trace.py")
_OF_THE_ENGINE = ("sampling_params", "outputs", "request", "memory", "policy", "table", "prompts_underway", "scheduler")
TORCHLESS += tuple(f"engine/{name}.py" for name in _OF_THE_ENGINE)

# Files and classes that are larger than they should be, and why they are.
LARGE = {
    "vattn/hf/cache.py VirtualCache": "most are those of transformers' Cache",
    "vattn/engine/request.py Request": "a record",
    "vattn/engine/sampling_params.py SamplingParams": "a record",
    "vattn/engine/options.py EngineOptions": "a record",
    "vattn/kernels/base.py AttentionSpec": "a record of what kernels differ in",
    "vattn/memory/kv_cache.py KVCache": "one line each: what a cache can do",
    "vattn/memory/stats.py CacheStats": "a record",
    "vattn/memory/sequence.py Sequence": "one line each: what a sequence can do",
    "vattn/bench/baseline_pages.py Pages": "three ways to map in one, none of them part of the library",
    "vattn/bench/replay.py Result": "a record",
    "vattn/bench/replay.py _Measured": "a record",
}


def rows(folder: str) -> Iterator[tuple[str, set[str]]]:
    """Yields each name in the tables' rows on a folder, and the names that it may import or include."""
    for line in (ROOT / "docs" / "design" / "house.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if len(cells) == 3 and cells[0].startswith(f"`{folder}/"):
            may = set() if cells[2] == "nothing" else {name.strip("` ") for name in cells[2].split(",")}
            yield cells[0].strip("`").removeprefix(f"{folder}/").rstrip("/"), may


def files_of_table() -> list[str]:
    """Returns the files of all packages, in the order of the table."""
    named = []
    for line in (ROOT / "docs" / "design" / "house.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if len(cells) == 2 and cells[0].startswith("`vattn/"):
            named += re.findall(r"`(vattn/\w+/\w+\.py)`", cells[0])
    return named


def csrc() -> dict[str, set[str]]:
    allowed = {}
    for name, may in rows("csrc"):
        stem, _, kinds = name.partition(".")
        for kind in kinds.strip("{}").split(","):
            allowed[f"{stem}.{kind}"] = may | ({stem} if kind == "cpp" and "," in kinds else set())
    return allowed


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yields each dotted name that a file imports, and whether only for type checking."""
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{alias.name}", id(node) in typing) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in typing) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield ast.literal_eval(node.args[0]), id(node) in typing


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def test_there_is_something_to_hold():
    assert len(FILES) > 30
    assert len(SOURCES) > 20
    assert {room_of(path) for path in FILES} == {name for name, _ in rows("vattn")}
    assert set(csrc()) == {path.name for path in SOURCES}
    inside = {name for name in NAMES if name.count("/") == 2 and "__" not in name}
    assert sorted(files_of_table()) == sorted(inside)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_csrc(path):
    included = set(re.findall(r'#include "(\w+)\.hpp"', path.read_text()))
    assert included <= csrc()[path.name]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_rooms(path):
    room = room_of(path)
    allowed = dict(rows("vattn"))[room]
    known = {name.split(".")[1] for name, _ in imports(path) if name.startswith("vattn.")}
    known -= {room, "__version__"}
    if "everything" not in allowed:
        assert known <= {name.removesuffix(".py") for name in allowed}
    knows_transformers = any(name.split(".")[0] == "transformers" for name, _ in imports(path))
    reads_configurations = path == PACKAGE / "memory" / "configuration.py"  # uses transformers if it is installed
    assert not knows_transformers or reads_configurations or allowed & {"transformers", "everything"}
    if str(path.relative_to(PACKAGE)) in TORCHLESS:
        assert not any(name.split(".")[0] == "torch" for name, _ in imports(path))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_know_those_before_them(path):
    order = [name.removesuffix(".py").replace("/", ".") for name in files_of_table()]
    me = str(path.relative_to(ROOT)).removesuffix(".py").replace("/", ".")
    if me not in order:
        return
    package = me.rpartition(".")[0]
    for name, for_types in imports(path):
        within = next((one for one in order if f"{name}.".startswith(f"{one}.")), None)
        if within is not None and within.rpartition(".")[0] == package and not for_types:
            assert order.index(within) < order.index(me), f"{me} knows {within}, which stands behind it"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_private_name_is_imported(path):
    names = [name.rpartition(".")[2] for name, _ in imports(path) if name.startswith("vattn.")]
    private = [name for name in names if name.startswith("_") and not name.startswith("__") and name != "_core"]
    assert not private


def sizes(path: Path) -> Iterator[tuple[str, bool]]:
    """Yields the names of a file and of its classes, and whether each is larger than it should be."""
    text, name = path.read_text(), str(path.relative_to(ROOT))
    yield name, text.count("\n") > LINES
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ClassDef):
            continue
        methods = [one for one in node.body if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))]
        attributes = {one.target.id for one in node.body if isinstance(one, ast.AnnAssign)}  # type: ignore[union-attr]
        attributes |= {
            one.attr
            for method in methods
            for one in ast.walk(method)
            if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store) and ast.unparse(one.value) == "self"
        }
        yield f"{name} {node.name}", len(methods) > METHODS or len(attributes) > ATTRIBUTES


def test_nothing_is_large_without_a_reason():
    found = {name for path in FILES for name, large in sizes(path) if large}
    assert found == set(LARGE)


def test_there_are_few_floors():
    """A package is one floor above the highest that it may import from; there are at most eight, and no circle."""
    rooms = dict(rows("vattn"))

    def floor(room: str, above: tuple[str, ...] = ()) -> int:
        assert room not in above, f"{room} may import what may import it"
        known = {name if name in rooms else f"{name}.py" for name in rooms[room]} & set(rooms)
        if "everything" in rooms[room]:
            known = {name for name in rooms if name not in (room, "__init__.py", "__main__.py", "cli")}
        return 1 + max((floor(name, (*above, room)) for name in known), default=0)

    assert 5 < max(map(floor, rooms)) <= 8


def test_only_the_bindings_know_python():
    for path in SOURCES:
        assert ("pybind11" in path.read_text()) == (path.name == "bindings.cpp")


def test_only_the_command_line_reads_the_environment():
    for path in [*SOURCES, *FILES]:
        if PACKAGE / "cli" not in path.parents:
            assert not re.search(r"getenv|os\.environ", path.read_text()), path.name


# Attributes of other packages that begin with an underscore and may be used.
FOREIGN = {
    *("_C", "_cdata", "_cuda_endAllocateToPool", "_cuda_getCurrentRawStream", "_cuda_releasePool", "_version"),
    *("_disabled_torch_function_impl", "_dynamo", "_flash_attention_forward", "_flash_attn_forward", "_foreach_copy_"),
    *("_buffers", "_forward_hooks", "_forward_pre_hooks", "_parameters", "_sleep", "_getframe"),
    *("_global_forward_hooks", "_global_forward_pre_hooks"),
}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_private_name_of_another_module_is_used(path):
    tree = ast.parse(path.read_text())
    mine = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            mine.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            mine |= {target.id for target in targets if isinstance(target, ast.Name)}
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in used - mine - FOREIGN if name.startswith("_") and not name.startswith("__")} == set()


def test_usual_runs_leave_out_most_parameters_of_what_takes_long():
    class Item:
        def __init__(self, name, marks, **params):
            self.nodeid = f"a.py::{name}[{params}]"
            self.marks = {mark: SimpleNamespace(args=args) for mark, args in marks.items()}
            self.callspec = SimpleNamespace(params=params)

        def get_closest_marker(self, name):
            return self.marks.get(name)

    def grid(name, marks, *sizes):
        axes = [range(size) for size in sizes]
        return [Item(name, marks, a=a, b=b, c=c) for a, b, c in itertools.product(*axes)]

    plain, alone = grid("plain", {}, 1, 1, 5), Item("alone", {"thorough": ()})
    on_cpu, few = grid("some", {"thorough": (4,)}, 2, 2, 4), grid("few", {"thorough": (4,)}, 1, 1, 3)
    on_gpu = grid("some", {"thorough": (4,), "gpu": ()}, 2, 2, 4)
    left_out = unusual([*plain, alone, *on_cpu, *on_gpu, *few])
    assert alone in left_out
    assert not left_out & {*plain, *few}
    for items in (on_cpu, on_gpu):
        kept = [item.callspec.params for item in items if item not in left_out]
        assert len(kept) == 4
        assert [len({params[axis] for params in kept}) for axis in "abc"] == [2, 2, 4]
