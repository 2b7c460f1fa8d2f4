"""Plots and TensorBoard may fail without affecting the results."""

from __future__ import annotations

import threading
import time
import warnings

import pytest

from utils.reporting.best_effort import BestEffort


@pytest.mark.parametrize("error", [OSError(28, "No space left"), ImportError("no module"), ValueError("a\nb"), MemoryError()])
def test_a_failure_is_one_line(said: list[str], error: Exception) -> None:
    """Each failure is logged in one line with its name and reason and is not tried again; other functions still run."""
    best_effort, calls = BestEffort(), []

    def fail(number: int) -> None:
        calls.append(number)
        raise error

    assert not best_effort.attempt("log/a.png", fail, 1)
    assert not best_effort.attempt("log/a.png", fail, 2)
    assert best_effort.attempt("log/b.png", calls.append, 3)
    assert calls == [1, 3]
    assert len(said) == 1 and said[0].startswith("warning: log/a.png: ") and "\n" not in said[0]
    assert type(error).__name__ in said[0]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_is_not_a_failure(said: list[str], stop: type[BaseException]) -> None:
    """Ctrl-C while a plot is drawn stops the run."""

    def interrupt() -> None:
        raise stop

    with pytest.raises(stop):
        BestEffort().attempt("a", interrupt)
    assert said == []


def test_warnings_are_one_line(said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Any number of library warnings becomes one line that names the function's purpose."""

    def warn() -> None:
        for number in range(7):
            warnings.warn(f"Glyph {number} missing", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert BestEffort().attempt("log/a.png", warn)
    assert len(said) == 1 and said[0].startswith("warning: log/a.png: ") and "6 more" in said[0]
    assert capsys.readouterr().err == ""


def test_threads_do_not_lose_warnings(said: list[str]) -> None:
    """Two overlapping threads leave Python's warning filters as they were."""
    best_effort = BestEffort()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=best_effort.attempt, args=(str(t), time.sleep, t)) for t in (0.1, 0.2)]
        for thread in threads:
            thread.start()
            time.sleep(0.03)
        for thread in threads:
            thread.join()
        warnings.warn("afterwards", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["afterwards"] and said == []
