"""Every public name is listed in docs/names.md, and former names still work, with a warning."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import vattn
from vattn import CacheStats, DecodeStats, KVCache

TEXT = (Path(__file__).parents[1] / "docs" / "names.md").read_text()
MODULES = ("vattn", "vattn.engine", "vattn.hf", "vattn.kernels")


def table(heading: str) -> list[list[str]]:
    """Returns the rows of the table under a heading, without backticks."""
    text = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip().strip("`") for cell in line.strip("| ").split(" | ")] for line in text.splitlines()]
    return [row for row in rows if len(row) > 1 and not set(row[0]) <= set("-")][1:]


def public(owner: type) -> set[str]:
    """Returns the names that a class itself defines and that do not begin with an underscore."""
    return {name for name in vars(owner) if not name.startswith("_")}


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_listed(module):
    listed = {name for where, name, _ in table("Names") if where == module}
    assert listed == set(importlib.import_module(module).__all__)


@pytest.mark.parametrize("owner", [vattn.KVCache, vattn.Sequence, vattn.KVLayout, vattn.VirtualCache], ids=str)
def test_members_are_listed(owner):
    [listed] = [names for name, names in table("Members") if name == owner.__name__]
    aliases = {was.partition(".")[2] for was, _ in table("Renamed") if was.startswith(f"{owner.__name__}.")}
    assert set(re.findall(r"\w+", listed)) == public(owner) - aliases - {"decoder"}


@pytest.mark.parametrize(("was", "now"), [row for row in table("Renamed") if row[0].startswith("vattn.")])
def test_modules_know_what_names_were(was, now):
    module, _, name = was.rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{was} is called {now} now"):
        old = getattr(importlib.import_module(module), name)
    assert old is getattr(importlib.import_module(module), now)


def test_every_renamed_name_is_tried():
    rest = {tuple(row) for row in table("Renamed") if not row[0].startswith("vattn.")}
    assert rest == {
        ("KVCache.settle", "wait_idle"),
        ("CacheStats.retired", "deferred"),
        ("DecodeStats.ahead", "speculative"),
        ("KVCache.own_all", "copy_on_write"),
    }
    with KVCache(
        vattn.KVLayout([vattn.LayerShape(kv_heads=1, head_dim=8, dtype="float32")], max_len=64), slots=1
    ) as cache:
        with pytest.warns(DeprecationWarning, match="KVCache.settle is called wait_idle now"):
            cache.settle()
        with pytest.warns(DeprecationWarning, match="KVCache.own_all is called copy_on_write now"):
            assert cache.own_all == cache.copy_on_write
        stats = cache.stats()
        with pytest.warns(DeprecationWarning, match=r"CacheStats\.retired is called deferred now"):
            assert stats.retired == stats.deferred
        assert isinstance(stats, CacheStats)
        assert "retired" not in vars(stats)
    decoded = DecodeStats(4, 3, 2, 0, 1, 1, 0, None, None)
    with pytest.warns(DeprecationWarning, match=r"DecodeStats\.ahead is called speculative now"):
        assert decoded.ahead == decoded.speculative == 2


def test_an_error_is_caught_by_the_name_that_it_had():
    with pytest.warns(DeprecationWarning, match="BudgetExceeded"):
        from vattn import OutOfPages
    with pytest.raises(OutOfPages):
        raise vattn.BudgetExceeded("spent")


@pytest.mark.parametrize("module", ["vattn", "vattn.kernels", "vattn.errors"])
def test_other_names_are_none(module):
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        importlib.import_module(module).nothing  # noqa: B018
