from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch

from vattn import KVCache, _core

HAS_GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def driver(device: str) -> _core.Driver:
    return _core.host_driver(GRANULE) if device == "cpu" else _core.cuda_driver(0)


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every cache that a test leaves behind must pass check(), and no destructor may have had to report."""
    made: list[weakref.ref[KVCache]] = []
    original = KVCache.__init__

    def init(self: KVCache, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(KVCache, "__init__", init)
    yield
    for reference in made:
        if (cache := reference()) is not None:
            cache.check()
            assert cache._arena.driver.reports == 0


GRANULE = 2 * 1024 * 1024
