"""What all benchmarks share: options, a JSON file that also records machine and versions, a table on the terminal."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from vattn import _core

ROOT = Path(__file__).parents[1]


def options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for the JSON (default: none is written)")
    return parser


def native(target: str, *arguments: str) -> str:
    """Builds and runs one of the C++ programs, and returns what it prints."""
    with tempfile.TemporaryDirectory() as build:
        for command in (
            [
                *("cmake", "-S", str(ROOT), "-B", build, "-G", "Ninja"),
                *("-DVATTN_PYTHON=OFF", "-DVATTN_NATIVE=ON", f"-DPython_EXECUTABLE={sys.executable}"),
            ],
            ["cmake", "--build", build, "--target", target],
        ):
            subprocess.run(command, check=True, capture_output=True)
        return subprocess.run([f"{build}/{target}", *arguments], check=True, capture_output=True, text=True).stdout


def read(name: str, device: str, out: Path | None) -> list[dict[str, Any]]:
    """The rows of the file that ``write`` writes with the same arguments; none where there is no such file."""
    path = _path(name, device, out) if out else None
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path and path.exists() else []
    return rows


def _path(name: str, device: str, out: Path) -> Path:
    return out / f"{name}-{'cuda' if device.startswith('cuda') else 'cpu'}.json"


def write(name: str, device: str, rows: list[dict[str, Any]], bars: dict[str, float], out: Path | None) -> None:
    """Prints the rows and the results by name (``bars``), and writes them to ``<out>/<name>-<cpu or cuda>.json``.

    No file is written where ``out`` is None.
    """
    for row in rows:
        print("  ".join(f"{key} {_short(value)}" for key, value in row.items()))
    for bar, value in bars.items():
        print(f"{bar} = {_short(value)}")
    if out is None:
        return
    probe = _core.probe_cuda()
    on_gpu = device.startswith("cuda")
    result = {
        "benchmark": name,
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{_cpu()}, {os.cpu_count()} cores",
        "driver": _driver_version() if probe["available"] else None,
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in ("torch", "transformers")},
            "cuda": torch.version.cuda,
            "kernel": platform.release(),
        },
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rows": rows,
        "bars": bars,
    }
    out.mkdir(parents=True, exist_ok=True)
    path = _path(name, device, out)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


def _commit() -> str:
    """The commit that is measured. VATTN_COMMIT names it on machines that have the files without the git history."""
    if named := os.environ.get("VATTN_COMMIT"):
        return named
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return (head or "unknown") + ("+changes" if dirty.strip() else "")
