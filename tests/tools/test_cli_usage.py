"""The command's manners: help at once, usage errors with status 2, one JSON object and nothing else when asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
COMMANDS = ("build", "compress", "serve", "generate", "verify", "evaluate", "bench", "demo", "devices")
JSON_COMMANDS = (*COMMANDS[:-1], "devices list", "devices show", "devices validate")


def test_help_answers_in_under_a_second(process: Run) -> None:
    runs = [process("--help") for _ in range(2)]
    assert runs[0].status == 0
    assert all(f" {name} " in runs[0].out for name in COMMANDS)
    assert "0 done, 1 failed, 2 misused, 3 refused" in runs[0].out
    assert min(run.cpu_s for run in runs) < 1.0


def test_a_subcommands_help_imports_nothing_heavy(process: Run) -> None:
    done = process("build", "--help", without=("torch", "diffusers", "transformers", "onnx", "onnxruntime", "numpy"))
    assert done.status == 0, done.err
    assert "--device" in done.out


@pytest.mark.parametrize("words", JSON_COMMANDS)
def test_every_subcommand_has_help_and_json(words: str, command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    done = command(*words.split(), "--help")
    assert done.status == 0
    assert f"Usage: latentrelay {words}" in done.out
    assert "--json" in done.out


def test_version(command: Run) -> None:
    assert command("--version").out == f"latentrelay {metadata.version('latentrelay')}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate",), "prompt"),
        (("generate", "-p", "x", "-b", "b", "--seed", "many"), "seed"),
        (("generate", "-p", "x", "-b", "b", "--split", "-1"), "split"),
        (("generate", "-p", "x", "-b", "b", "--wire-dtype", "float8"), "wire dtype"),
        (("generate", "-p", "x", "-b", "b", "-o", "no/such/folder/out.png"), "no/such/folder"),
        (("generate", "-p", "x", "-b", "b", "-o", "."), "folder"),
        (("serve", "--port", "70000"), "port"),
        (("verify",), "bundle"),
        (("verify", "b", "--fast"), "--fast"),
        (("paint",), "paint"),
        (("demo", "--split", "26"), "split"),
        (("evaluate", "--split", "train"), "split"),
    ],
)
def test_a_usage_error_is_status_2_and_one_object(
    arguments: tuple[str, ...], words: str, command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command(*arguments, "--json")
    document = done.json
    assert (done.status, document["ok"], document["exit_status"]) == (2, False, 2)
    assert words in document["reason"].lower()
    said = command(*arguments)
    assert (said.status, said.out) == (2, "")
    assert words in said.err.lower()
    assert not list(tmp_path.iterdir())


def test_a_usage_error_of_a_process(process: Run) -> None:
    done = process("generate", "--json")
    assert done.status == 2
    assert done.json["exit_status"] == 2


def test_build_without_its_extra_names_it(process: Run, tmp_path: Path) -> None:
    done = process("build", "-m", tmp_path, "-d", "pixel-8", "-o", tmp_path / "b", "--json", without=("torch",))
    assert done.status == 2, done.err
    document = done.json
    assert (document["error"], document["exit_status"]) == ("MissingExtraError", 2)
    assert "'torch'" in document["reason"]
    assert 'pip install "latentrelay[export]"' in document["reason"]
    assert not (tmp_path / "b").exists()


def test_serve_without_its_extra_names_it(process: Run) -> None:
    done = process("serve", "-m", "x", without=("torch",))
    assert (done.status, done.out) == (2, "")
    assert 'pip install "latentrelay[cloud]"' in done.err


# A suite that runs as a background job inherits an ignored SIGINT; a command in a terminal does not.
_BUSY = """
import signal, sys, time
from pathlib import Path
from latentrelay.tools import cli, verify

def run(path, **_):
    try:
        Path("begun").touch()
        time.sleep(60)
    finally:
        Path("cleaned").touch()

verify.run = run
signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main(["verify", "b", *sys.argv[1:]])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_signal_unwinds_the_command(number: int, status: int, as_json: bool, tmp_path: Path) -> None:
    flags = ["--json"] if as_json else []
    settings = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", _BUSY, *flags],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=settings,
    ) as running:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        running.send_signal(number)
        out, err = running.communicate(timeout=60)
    assert running.returncode == status, err
    assert (tmp_path / "cleaned").exists()
    assert b"Traceback" not in err
    if as_json:
        assert json.loads(out)["exit_status"] == status
    else:
        assert out == b""


def test_an_error_nobody_foresaw_is_an_object_too(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentrelay.tools import verify

    def run(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(verify, "run", run)
    done = command("verify", "b", "--json")
    assert (done.status, done.json["error"], done.json["exit_status"]) == (1, "ZeroDivisionError", 1)
    assert "Traceback" in done.err


@pytest.mark.skipif(sys.platform != "linux", reason="file names are any bytes on Linux only")
def test_a_name_that_is_no_text_is_reported(command: Run, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff[/b]")
    done = command("verify", name, "--json")
    assert (done.status, done.json["error"]) == (3, "ManifestError")
    assert r"\udcff[/b]" in done.err
