"""The rank of a process, from its environment variables."""

from __future__ import annotations

import pytest
import torch

from utils.errors import UserError
from utils.runtime import machine, processes
from utils.runtime.processes import Process, find_process, leftovers

MEETING = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests themselves may have been started by a launcher."""
    for name in {*processes.COUNTS, *processes.RENDEZVOUS}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected", "left"),
    [
        ({}, Process(), []),
        ({"WORLD_SIZE": "2"}, Process(), ["WORLD_SIZE=2"]),
        ({"WORLD_SIZE": ""}, Process(), []),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, Process(), []),
        ({"RANK": "1"}, Process(), ["RANK=1"]),
        ({"RANK": "abc"}, Process(), ["RANK=abc"]),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, Process(), ["WORLD_SIZE=2", "RANK=1", "LOCAL_RANK=1"]),
        (MEETING | {"WORLD_SIZE": "4"}, Process(), ["WORLD_SIZE=4"]),
        (MEETING | {"WORLD_SIZE": "1", "RANK": "0"}, Process(0, 1, 0), []),
        (MEETING | {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, Process(3, 4, 1), []),
        (MEETING | {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": ""}, Process(1, 2, 0), []),
    ],
)
def test_only_a_complete_launch_makes_one_of_several(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Process, left: list[str]
) -> None:
    """A process joins others only if all required variables are set; leftovers are reported."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_process() == expected and leftovers() == left
    assert processes.rank() == expected.rank


@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "two"), ("RANK", "-1"), ("RANK", "2"), ("LOCAL_RANK", "0.5"), ("WORLD_SIZE", "0")]
)
def test_an_invalid_launch_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """An invalid number in a complete launch is refused with its variable and value; reporting the rank does not fail."""
    for key, text in (MEETING | {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", name: value}).items():
        monkeypatch.setenv(key, text)
    with pytest.raises(UserError) as caught:
        find_process()
    line = str(caught.value)
    assert (name in line and value in line) and "torchrun" in line and "\n" not in line
    assert processes.rank() == 0


def test_leftovers_are_ignored_in_one_line(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """A run with a leftover WORLD_SIZE is a single process and logs that; test.py ignores the variable."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert machine.choose_machine("cpu", False).world_size == 1
    assert len(said) == 1 and said[0].startswith("warning: WORLD_SIZE=4: ")
    for name, value in (MEETING | {"RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    assert machine.choose_machine("cpu", False, alone=True) == machine.Machine(torch.device("cpu"))
    assert len(said) == 1


def test_processes_that_cannot_connect_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address where no process listens is reported in one line, not by a traceback of the library."""
    for name, value in (MEETING | {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "none"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        machine.choose_machine("cpu", False)
    assert "localhost:none" in str(caught.value) and "torchrun" in str(caught.value) and "\n" not in str(caught.value)
