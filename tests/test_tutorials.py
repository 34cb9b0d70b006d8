"""The code on the pages of the tutorials runs, page by page, from the first block to the last."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from vattn.models.versions import VERSION

engine = pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")
PAGES = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"^```python(?P<about>[^\n]*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(text):
    """Yields each block of a page, at the lines where it stands, and what is said about it."""
    for found in BLOCK.finditer(text):
        yield "\n" * (text[: found.start()].count("\n") + 1) + found["code"], found["about"].strip()


def test_the_pages_are_found():
    assert len(PAGES) >= 4
    assert all(not about for page in PAGES for _, about in blocks(page.read_text()))  # none that does not run here


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem, marks=[engine] if page.stem == "operators" else []) for page in PAGES]
)
def test_a_tutorial_runs(page, capsys):
    names = {"__name__": "tutorial"}
    for code, _ in blocks(page.read_text()):
        exec(compile(code, str(page), "exec"), names)


def test_a_wrong_line_is_told():
    page = "text\n```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n"
    (first, _), (second, _) = blocks(page)
    names = {}
    exec(compile(first, "page", "exec"), names)
    with pytest.raises(AssertionError) as error:
        exec(compile(second, "page", "exec"), names)
    assert error.traceback[-1].lineno == 6
