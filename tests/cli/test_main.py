"""The front door: help at once, one line for what goes wrong, and an exit code that programs can read."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelwright import __version__
from modelwright.cli.main import VERBS, main

MW = [sys.executable, "-m", "modelwright"]


def run_mw(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*MW, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


def test_help_shows_every_verb_in_order_with_an_example():
    done = run_mw("--help")
    assert done.returncode == 0
    places = [done.stdout.index(f"\n  {verb} ") for verb in VERBS]
    assert places == sorted(places)
    assert all(verb.example in done.stdout for verb in VERBS.values())
    assert run_mw().stdout == done.stdout


def test_help_takes_well_under_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run_mw("--help")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.7


def test_the_version_is_that_of_the_package():
    assert run_mw("--version").stdout == f"modelwright {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]):
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Usage" in shown and f"mw {verb}" in shown
    assert "Example: " in shown


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_at_most_a_hundred_lines(verb: str):
    module = VERBS[verb].target.partition(":")[0].rpartition(".")[2]
    folder = Path(sys.modules["modelwright.cli.main"].__file__ or "").parent
    assert (folder / f"{module}.py").read_text().count("\n") <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quikstart"], "'quikstart' is not a verb of mw. Did you mean 'quickstart'?"),
        (["zzz"], "Known: quickstart, data, "),
        (["quickstart", "--minuts", "3"], "No such option: --minuts"),
        (["train", "recipe.yaml", "--resum"], "No such option: --resum. Did you mean --resume?"),
        (["data", "docs", "--ot", "x"], "No such option: --ot. Did you mean --out?"),
        (["train"], "Missing argument"),
        (["tokenizer", "train", "runs/data"], "Missing option"),
        (["tokenizer", "runs/data"], "No such command"),
        (["tokenizer", "train", "runs/data", "--out", "x", "--vocab-size", "many"], "Invalid value for '--vocab-size'"),
        (["lineage", "a", "b"], "unexpected extra argument"),
        (["ask", "index", "question", "--k", "0"], "Invalid value for '--k'"),
    ],
)
def test_a_command_written_wrongly_ends_with_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert message in shown.err
    assert f"mw {arguments[0]} --help" in shown.err or "mw --help" in shown.err


def test_an_unknown_flag_is_answered_with_the_nearest_right_one(capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "--prot", "80"]) == 2
    assert "--port" in capsys.readouterr().err


def test_the_process_ends_with_the_same_codes_and_no_traceback(tmp_path: Path):
    wrong, missing = run_mw("trian"), run_mw("lineage", tmp_path / "none")
    assert (wrong.returncode, missing.returncode) == (2, 1)
    assert re.fullmatch(r"error: .*none is not an artifact: .*\n", missing.stderr)
    assert "Traceback" not in wrong.stderr + missing.stderr


def test_the_traceback_comes_back_for_those_who_ask(tmp_path: Path):
    done = run_mw("lineage", tmp_path / "none", env={**os.environ, "MODELWRIGHT_DEBUG": "1"})
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "DataError" in done.stderr


def test_a_port_in_use_is_named_before_anything_is_loaded(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_mw("serve", tmp_path / "no-model", "--port", port)
        quickstart = run_mw("quickstart", tmp_path / "no-docs", "--out", tmp_path / "out", "--port", port)
    for shown in (done, quickstart):
        assert shown.returncode == 1
        assert f"Port {port} of 127.0.0.1 is in use" in shown.stderr and f"--port {port + 1}" in shown.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["lineage", "--help"]])
def test_a_reader_that_leaves_before_anything_is_printed_is_no_error(arguments: list[str]):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*MW, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert done.returncode in (0, 1)  # rich ends the process with 1 where it notices first
    assert done.stderr == ""


def test_an_interrupt_ends_with_130(tmp_path: Path):
    program = (
        "import modelwright.cli.lineage as m, signal, time\n"
        # A job that a shell put in the background starts with interrupts ignored, and so do its children.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def walk(path):\n    print('at work', flush=True)\n    time.sleep(60)\n"
        "m.walk = walk\nfrom modelwright.cli.main import run; run()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "lineage", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=20)
    assert process.returncode == 130
    assert shown == "error: interrupted; what was finished is kept.\n"
