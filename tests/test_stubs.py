"""The stub of the core says what the core has: every name, every argument and every default."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from vattn import _core

STUB = ast.parse((Path(_core.__file__).parent / "_core.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef) and hasattr(_core, node.name)}


def members(of):
    """The public names of the core, or of one of its classes, by what defines them."""
    return {name for name in vars(of) if not name.startswith("_")}


def functions(nodes):
    """By name, the argument lists of the functions of a stub, an overloaded one with several."""
    found: dict[str, list[str]] = {}
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and "property" not in map(ast.unparse, node.decorator_list):
            found.setdefault(node.name, []).append(shape(node.args))
    return found


def shape(arguments):
    """The names and defaults of a function's arguments."""
    for each in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        each.annotation = None
    return ast.unparse(arguments).replace(" ", "")


def told(function):
    """The same as pybind11 tells it in the docstring of a function."""
    name = function.__name__
    lines = re.findall(rf"^(?:\d+\. )?{name}\((.*)\)(?: -> .*)?$", inspect.getdoc(function), re.MULTILINE)
    lines = [line for line in lines if not line.startswith("*args")]
    parsed = [ast.parse(f"def f({re.sub('<[^<>]*>', 'None', line)}): ...").body[0].args for line in lines]
    return [shape(each) for each in parsed]


def test_every_name_is_in_the_stub_and_no_other():
    classes = {name for name in members(_core) if inspect.isclass(getattr(_core, name))}
    assert classes == set(CLASSES)
    stubbed = {node.name for node in STUB.body if isinstance(node, ast.FunctionDef)}
    assert members(_core) - classes == stubbed


@pytest.mark.parametrize("name", [*CLASSES, None])
def test_arguments_and_defaults(name):
    of, nodes = (getattr(_core, name), CLASSES[name].body) if name else (_core, STUB.body)
    stubbed = functions(nodes)
    if name:
        listed = {node.name for node in nodes if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
        assert listed == members(of)
    for each, shapes in stubbed.items():
        if each != "__init__" and not each.startswith("__"):
            assert set(told(getattr(of, each))) == set(shapes), f"{name}.{each}"
