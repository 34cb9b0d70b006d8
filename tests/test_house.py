"""Imports go up the house only; needs no compiler and no import of vattn."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each room may know, floor by floor.
CSRC = {
    "error.hpp": set(),
    "driver.hpp": {"error"},
    "driver.cpp": {"driver"},
    "driver_cuda.cpp": {"driver"},
    "host_memory.hpp": {"driver"},
    "host_memory.cpp": {"host_memory"},
    "driver_host.cpp": {"driver", "host_memory"},
    "vmm.hpp": {"driver"},
    "vmm.cpp": {"vmm"},
    "extent_pool.hpp": {"vmm"},
    "extent_pool.cpp": {"extent_pool"},
    "mapper.hpp": set(),
    "mapper.cpp": {"mapper", "driver"},
    "host_pool.hpp": {"vmm"},
    "host_pool.cpp": {"host_pool"},
    "slot_set.hpp": set(),
    "arena.hpp": {"extent_pool", "host_pool", "mapper", "slot_set"},
    "hold.hpp": {"arena"},
    "arena.cpp": {"hold"},
    "audit.cpp": {"hold"},
    "reclaim.cpp": {"hold"},
    "sharing.cpp": {"hold"},
    "swap.cpp": {"hold"},
    "export.cpp": {"hold"},
    "sequence.hpp": {"arena"},
    "sequence.cpp": {"sequence"},
    "dlpack.hpp": set(),
    "bindings.cpp": {"sequence", "dlpack", "host_memory"},
}
PYTHON = {
    "errors.py": set(),
    "arguments.py": set(),
    "layout.py": {"arguments", "configuration"},  # of that when a configuration is given
    "configuration.py": {"arguments", "layout"},
    "prefix.py": set(),
    "export.py": {"arguments", "errors"},
    "device.py": {"_core", "arguments", "errors"},
    "guard.py": {"_core"},
    "sequence.py": {"_core", "arguments", "cache", "export"},  # of the cache only its type
    "cache.py": {"_core", "arguments", "device", "errors", "export", "guard", "layout", "prefix", "sequence"},
    "kernels.py": {"arguments"},
    "padding.py": set(),
    "scales.py": {"arguments"},
    "lane.py": {"cache", "layout"},
    "store.py": (
        {"arguments", "cache", "device", "errors", "kernels", "lane", "layout", "padding", "scales", "sequence"}
    ),
    "append.py": {"scales"},
    "step.py": {"append", "cache", "kernels", "padding", "store", "verify"},  # of verify only its types
    "prompt.py": {"kernels", "step", "verify"},  # of verify only its types
    "attach.py": set(),
    "compiled.py": set(),
    "verify.py": {"kernels", "padding", "scales", "step", "store"},
    "plan.py": {"attach", "capture", "step", "store", "verify"},
    "capture.py": set(),
    "decode.py": (
        {"append", "arguments", "attach", "cache", "capture", "compiled", "errors", "kernels", "padding", "plan"}
        | {"prompt", "step", "store", "verify"}
    ),
    "hf.py": {"arguments", "attach", "cache", "decode", "device", "lane", "layout", "plan", "scales", "step", "store"},
    "swap.py": {"cache", "device", "layout"},
    "demo.py": {"hf", "layout"},
    "trace.py": set(),
    "replay.py": {"cache", "errors", "trace"},
    "pages.py": {"_core", "cache", "errors"},
    "bench.py": {"_core", "cache", "device", "errors", "layout", "pages", "replay", "trace"},
    "speed.py": {"attach", "cache", "hf", "kernels", "layout"},
    "cli.py": (
        {"__version__", "_core", "bench", "cache", "demo", "device", "errors", "kernels", "layout", "speed", "trace"}
    ),
    "__main__.py": {"cli"},
    "__init__.py": {"cache", "errors", "hf", "layout", "sequence", "swap"},
}
TORCHLESS = {"arguments.py", "configuration.py", "errors.py", "export.py", "layout.py", "prefix.py", "trace.py"}


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").iterdir()), ids=lambda path: path.name)
def test_csrc(path):
    included = set(re.findall(r'#include "(\w+)\.hpp"', path.read_text()))
    assert included <= CSRC[path.name]


@pytest.mark.parametrize("path", sorted((ROOT / "vattn").glob("*.py")), ids=lambda path: path.name)
def test_python(path):
    known, torch_used = set(), False
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.module == "vattn":
                known |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("vattn."):
                known.add(node.module.split(".")[1])
            torch_used |= bool(node.module) and node.module.split(".")[0] == "torch"
        elif isinstance(node, ast.Import):
            torch_used |= any(alias.name.split(".")[0] == "torch" for alias in node.names)
    assert known <= PYTHON[path.name]
    assert not (torch_used and path.name in TORCHLESS)


def test_only_the_bindings_know_python():
    for path in (ROOT / "csrc").iterdir():
        assert ("pybind11" in path.read_text()) == (path.name == "bindings.cpp")


def test_only_the_command_line_reads_the_environment():
    for path in [*(ROOT / "csrc").iterdir(), *(ROOT / "vattn").glob("*.py")]:
        if path.name != "cli.py":
            assert not re.search(r"getenv|os\.environ", path.read_text()), path.name
