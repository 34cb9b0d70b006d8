"""What the page of messages quotes is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
FEWEST = 12  # characters of a piece of a message that is looked for


def said() -> str:
    """All texts of the code, without what is filled in; the parts of a text on several lines are joined."""
    sources = [*(ROOT / "vattn").rglob("*.py"), *(ROOT / "csrc").glob("*pp")]
    text = "\n".join(path.read_text() for path in sources)
    text = re.sub(r"\{[^{}\n]*\}", "…", text)
    text = re.sub(r'"\s*\+\s*std::to_string\([^"]*\)\s*\+\s*"', "…", text)
    return re.sub(r'"\s*(?:\+\s*)?f?"', "", text)


SAID = said()


def messages():
    """The messages in the first column of each table, one by one, and the pieces of each between what is filled in."""
    for line in PAGE.splitlines():
        cells = re.split(r"(?<!\\) \| ", line.strip("| "))
        if not line.startswith("| ") or cells[0] in ("message", "reason", "error") or set(cells[0]) <= set("-|"):
            continue
        for message in re.sub(r"^`\w+`: ", "", cells[0]).split("; "):
            pieces = [piece.strip(" .,:()`") for piece in re.split("…|`[^`]*`", message)]
            if pieces := [piece for piece in pieces if len(piece) >= FEWEST]:
                yield message, pieces


def test_there_are_messages():
    assert len(list(messages())) > 70


@pytest.mark.parametrize(("message", "pieces"), list(messages()), ids=[message[:40] for message, _ in messages()])
def test_a_message_is_in_the_code(message, pieces):
    assert [piece for piece in pieces if piece not in SAID] == []
