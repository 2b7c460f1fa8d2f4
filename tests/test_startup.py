"""The start of a command, and how signals end it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

from utils import cli
from utils.errors import UserError

SIGNALS = pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])


def start(*command: object, folder: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """Start Python; modules in `folder` take precedence over all others."""
    paths = os.pathsep.join(map(str, (*([folder] if folder else []), REPOSITORY)))
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def signalled(process: subprocess.Popen[str], *numbers: signal.Signals) -> tuple[int, str]:
    """Wait for a line, send signals; return exit code and standard error."""
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    return process.returncode, error


@SIGNALS
@pytest.mark.parametrize("command", [["ASD.py"], ["test.py"], ["-m", "data.poison"], ["-m", "benchmark"]], ids=str)
def test_a_command_is_stopped_while_it_is_imported(
    tmp_path: Path, command: list[str], number: signal.Signals, code: int
) -> None:
    """During the slow imports, Ctrl-C and SIGTERM end each command in one line, also within a library's own import."""
    library = "import time\nprint('ready', flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException: raise ImportError\n"
    for name in ("numpy.py", "torch.py"):
        (tmp_path / name).write_text(library)
    path = [REPOSITORY / command[0]] if command[0].endswith(".py") else command
    got, error = signalled(start(*path, folder=tmp_path), number)
    assert got == code
    assert error.strip().count("\n") == 0 and error.strip() == f"{command[-1]}: stopped."


WORK = """
import pathlib, sys, time
from utils.cli import command

def main():
    path = pathlib.Path(sys.argv[1])
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        path.write_text("tidied")
        print("ready", flush=True)
        time.sleep(float(sys.argv[2]))

command("x.py", main, kept="All is kept.")
"""


@SIGNALS
def test_a_command_is_stopped_at_work(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """At work, both signals end the command with one line on what is saved, after its cleanup."""
    got, error = signalled(start("-c", WORK, tmp_path / "x", "0"), number)
    assert (got, error) == (code, "\nx.py: stopped. All is kept.\n") and (tmp_path / "x").read_text() == "tidied"


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    """A command that does not end after the first signal ends at the second, without a traceback."""
    process = start("-c", WORK, tmp_path / "x", "60")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert signalled(process, signal.SIGINT) == (130, "")


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """A command started with Ctrl-C ignored, like a background job of a shell, is not stopped by it."""
    script = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n" + WORK
    code, error = signalled(start("-c", script, tmp_path / "x", "0"), signal.SIGINT, signal.SIGTERM)
    assert (code, error) == (143, "\nx.py: stopped. All is kept.\n")


def test_a_signal_while_another_process_is_waited_for(tmp_path: Path) -> None:
    """A process that lets rank 0 report a common error ends silently when it is stopped."""
    script = (
        "from utils.cli import command\nfrom utils.errors import UserError\n"
        "def main():\n    print('ready', flush=True)\n    raise UserError('a: b: c')\ncommand('x.py', main)\n"
    )
    second = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1"}
    code, error = signalled(start("-c", script, **second), signal.SIGTERM)
    assert code == 143 and "Traceback" not in error and error.count("\n") <= 1


def test_a_system_without_locks_is_refused(tmp_path: Path) -> None:
    """Without fcntl (Windows), one line names the supported systems before anything else is imported."""
    (tmp_path / "fcntl.py").write_text("raise ModuleNotFoundError('fcntl')\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')\n")
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text("import sys\nsys.modules['fcntl'] = None\n")
    out, error = (process := start(REPOSITORY / "ASD.py", folder=tmp_path)).communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert error.startswith("ASD.py: error: ") and "Linux" in error and error.count("\n") == 1


PRINT = r"""
import sys
from utils.cli import command
def main():
    print("s\u00e9t b\udce9e \u732b")
    file = open(sys.argv[1], "w")
    print("to the terminal", file=sys.stderr)
    import os
    os.write(2, b"from a library")
    file.write("mine")
command("x.py", main)
"""


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", b"s\\xe9t b\\udce9e \\u732b\n"),
        ("latin-1", b"s\xe9t b\\udce9e \\u732b\n"),
        ("utf-8", b"s\xc3\xa9t b\\udce9e \xe7\x8c\xab\n"),
    ],
)
def test_any_name_can_be_printed(tmp_path: Path, encoding: str, expected: bytes) -> None:
    """A name is printed on any terminal, with escapes if necessary."""
    odd = {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", PRINT, tmp_path / "x"], env=os.environ | odd, capture_output=True)
    assert (done.returncode, done.stdout) == (0, expected)


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\x1b[2Jb", "a\u2028b"])
def test_an_error_is_one_line_whatever_it_names(capsys: pytest.CaptureFixture[str], name: str) -> None:
    """A folder or file name with a line break or a control character does not forge a second line."""

    def fail() -> None:
        raise UserError(f"/data/{name}/caf\u00e9: not a folder")

    with pytest.raises(SystemExit) as caught:
        cli.run("x.py", fail)
    line = capsys.readouterr().err
    assert caught.value.code == 2 and line.count("\n") == 1 and line.endswith("caf\u00e9: not a folder\n")
    assert line.strip().isprintable()


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_no_error(tmp_path: Path, closed: str) -> None:
    """A command with closed streams runs, and the output of libraries does not get into its files."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = f'"$0" -c "$1" "$2" {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable, PRINT, str(tmp_path / "x")], env=environment, timeout=60)
    assert done.returncode == 0 and (tmp_path / "x").read_text() == "mine"


def test_output_that_cannot_be_written_is_one_line() -> None:
    """If standard output goes to a full disk, that is reported, even at the end."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from utils.cli import command\ncommand('x.py', lambda: print('done'))"],
            stdout=full, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
    assert done.returncode == 2 and "disk is full" in done.stderr and "Traceback" not in done.stderr


DEVICES = """
import os, time
from utils.cli import command
from utils.errors import UserError

def main():
    import torch
    from utils.runtime import machine
    torch.cuda.is_available, torch.cuda.device_count = (lambda: True), (lambda: 2)
    torch.cuda.set_device = lambda number: None
    machine.start_processes("0,1", lambda count: None)
    os.write(1, b"ready\\n")  # at once: two processes write it
    time.sleep(60)

command("x.py", main, kept="All is kept.")
"""


def test_sigterm_stops_all_processes_of_a_multi_device_run(tmp_path: Path) -> None:
    """SIGTERM to `--gpu 0,1` stops all processes; rank 0 reports it, and the exit code is 143."""
    (tmp_path / "x.py").write_text(DEVICES)
    process = start(tmp_path / "x.py")
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    code, error = signalled(process, signal.SIGTERM)
    assert code == 143 and error.count("x.py: stopped. All is kept.") == 1 and "Traceback" not in error
