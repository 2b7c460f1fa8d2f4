"""Log lines go to standard output for a command, to `asd.log` for a run, and nowhere else."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REPOSITORY
from test_layout import SOURCES

from utils import cli, logs
from utils.reporting.runlog import RunLog
from utils.runtime import processes

OURS, FOREIGN = logging.getLogger("data.io.tables"), logging.getLogger("somebody.else")


@pytest.fixture(autouse=True)
def _nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may have been started by a launcher, and other tests in this process may leave logs open."""
    for logger in map(logging.getLogger, logs.PACKAGES):
        for handler in list(logger.handlers):
            logs.detach(handler)
    for name in {*processes.COUNTS, *processes.RENDEZVOUS}:
        monkeypatch.delenv(name, raising=False)


def command(main: Callable[[], object]) -> None:
    """Run a main function as a command does."""
    with pytest.raises(SystemExit) as caught:
        cli.command("x.py", lambda: main() and None)
    assert caught.value.code == 0


def speak() -> None:
    """Log a line of each level, from this project and from a library."""
    for logger in (OURS, FOREIGN):
        logger.debug(f"{logger.name}: debug")
        logger.info(f"{logger.name}: 100 %s")
        logger.warning(f"{logger.name}: warning")


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_above_0_show_warnings_alone(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 prints plain messages from INFO on, the others only warnings; lines of libraries are not printed."""
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    for name, value in meeting.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "_exit", sys.exit)  # how ranks above 0 leave
    command(speak)
    expected = ["data.io.tables: 100 %s", "data.io.tables: warning"]
    assert capsys.readouterr().out.splitlines() == expected[rank:]


def test_several_commands_and_runs_print_nothing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one process, after other commands and runs, and with a root logger configured by a library, each line is printed
    once and recorded once, in the log of the open run."""

    def run() -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir(exist_ok=True)
            OURS.info(f"before {name}")
            log = RunLog(tmp_path / name, 0)
            OURS.info(f"during {name}")
            log.close()

    root = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(root)
    try:
        for _ in range(2):
            command(run)
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr().out.splitlines() == ["before a", "during a", "before b", "during b"] * 2
    for name in ("a", "b"):
        lines = (tmp_path / name / "asd.log").read_text().splitlines()
        assert [line.partition("  ")[2] for line in lines] == [f"during {name}"] * 2
    assert not any(logging.getLogger(name).handlers for name in logs.PACKAGES)


def test_a_library_user_has_pythons_usual_logging(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a command nothing is printed at INFO, and handlers of the user receive the lines, also after commands."""
    command(speak)
    capsys.readouterr()
    caplog.clear()
    speak()
    assert caplog.messages == ["data.io.tables: warning", "somebody.else: warning"] and capsys.readouterr().out == ""
    with caplog.at_level(logging.INFO, "data"):
        OURS.info("heard")
    assert caplog.messages[-1] == "heard"


def test_every_module_that_logs_is_covered() -> None:
    """The top-level loggers cover all folders whose modules log, and scripts."""
    texts = {source: (REPOSITORY / source).read_text(encoding="utf-8") for source in SOURCES}
    folders = {source.partition("/")[0] for source, text in texts.items() if "logging.getLogger(__name__)" in text}
    assert folders and {folder for folder in folders if not folder.endswith(".py")} <= set(logs.PACKAGES)


def test_a_full_disk_while_logging_is_an_error(tmp_path: Path) -> None:
    """A line that cannot be written to the log or to standard output ends the command with the error of the disk."""
    handler = logs.LogFile(Path("/dev/full"))
    logs.attach(handler)
    with pytest.raises(OSError) as caught:
        OURS.info("lost")
    with pytest.raises(OSError):
        logs.detach(handler)
    assert caught.value.errno == errno.ENOSPC
    script = "import logging\nfrom utils.cli import command\ncommand('x.py', lambda: logging.getLogger('data').info('lost'))\n"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "disk is full" in done.stderr and "Traceback" not in done.stderr
