"""Compiled layers are found by a second process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vattn.graphs import artifacts
from vattn.models.versions import VERSION

PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from serving import GREEDY, engine_of, model_of, prompts_of, served, tokens
from torch._dynamo.utils import counters
from vattn.graphs import artifacts
artifacts.FOLDER = Path({folder!r})
with engine_of(model_of("llama-gqa"), compile=True) as engine:
    assert engine.tier.uncompiled is None, engine.tier.uncompiled
    print("tokens", tokens(served(engine, prompts_of((12, 20)), GREEDY)))
aot = counters["aot_autograd"]
print("hits", aot["autograd_cache_hit"], "misses", aot["autograd_cache_miss"], "others", aot["autograd_cache_bypass"])
"""


@pytest.mark.thorough
@pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")
def test_a_second_process_compiles_nothing(tmp_path, monkeypatch):
    found = []
    for number in range(2):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / f"torch-{number}"))
        program = PROGRAM.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "ours"))
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
        assert run.returncode == 0, run.stderr[-3000:]
        found.append(dict(line.split(" ", 1) for line in run.stdout.splitlines() if line[:4] in ("toke", "hits")))
    assert len(list((tmp_path / "ours").iterdir())) == 1
    assert found[0]["hits"] == "0 misses 3 others 0"
    assert found[1]["hits"] == "3 misses 0 others 0"
    assert found[0]["tokens"] == found[1]["tokens"]


def test_files_that_are_of_no_use_change_nothing(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "vattn")
    monkeypatch.setattr(artifacts, "FOLDER", tmp_path / "a file")
    (tmp_path / "a file").write_text("in the way")
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"made", None))
    with artifacts.kept("model"):
        pass
    assert "cannot be written" in caplog.text
    monkeypatch.setattr(artifacts, "FOLDER", tmp_path / "folder")
    with artifacts.kept("model"):
        pass
    [file] = (tmp_path / "folder").iterdir()
    assert file.read_bytes() == b"made"
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"made anew", None))
    with artifacts.kept("model"):  # what is there cannot be loaded
        pass
    assert file.read_bytes() == b"made anew"
    with artifacts.kept("another model"):
        pass
    assert len(list((tmp_path / "folder").iterdir())) == 2


def test_an_error_in_between_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "FOLDER", tmp_path / "folder")
    with pytest.raises(RuntimeError, match="no"), artifacts.kept("model"):
        raise RuntimeError("no")
    assert not (tmp_path / "folder").exists()
