"""What compilations leave, in the user's cache folder, where later processes find it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

_LOG = logging.getLogger("vattn")
FOLDER = Path("~/.cache/vattn/compiled")


@contextlib.contextmanager
def kept(*key: Any) -> Iterator[None]:
    """Within this context compilations use what an earlier process has left, or leave it for later ones.

    torch decides what it can use again. A file that cannot be read or written changes nothing.

    Args:
        key: identifies what is compiled, by values whose texts tell them apart; torch's version is added.
    """
    digest = hashlib.sha256(repr((torch.__version__, *key)).encode()).hexdigest()[:32]
    path = FOLDER.expanduser() / f"{digest}.artifacts"
    loaded, before = _load(path), _misses()
    yield
    if not loaded or _misses() > before:
        _save(path)


def _misses() -> int:
    """How often torch has compiled what it had not compiled before."""
    return counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"]


def _load(path: Path) -> bool:
    with _tolerated("read", path):
        if path.is_file():
            return torch.compiler.load_cache_artifacts(path.read_bytes()) is not None
    return False


def _save(path: Path) -> None:
    with _tolerated("written", path):
        if (made := torch.compiler.save_cache_artifacts()) is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # Other processes see the whole file or none.
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(made[0])
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _tolerated(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch raises whatever a file from elsewhere makes it raise
        _LOG.info("compiled code cannot be %s, %s: %s", what, path, error)
