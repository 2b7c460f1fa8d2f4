"""The child processes of a sweep: ASD.py, then test.py, one run at a time for each worker."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import IO

import torch

from utils import files
from utils.errors import UserError, one_line
from utils.paths import PROJECT
from utils.runtime.machine import device_numbers
from utils.sweep import child
from utils.sweep.plan import Job, Plan, shown
from utils.sweep.progress import Progress
from utils.sweep.status import FINISHED, OUTPUT, forget_failure, last_line, mark_failed, status_of

logger = logging.getLogger(__name__)
SCRIPTS = ("ASD.py", "test.py")
LOCK = ".sweep.lock"
POLL = 0.2  # seconds between looks at the children
PATIENCE = 60.0  # seconds that a child has to stop


def environment(device: str) -> dict[str, str]:
    """Return what is added to a child's environment: on a CPU one thread, unless OMP_NUM_THREADS is set already."""
    return {"OMP_NUM_THREADS": "1"} if device == "cpu" and "OMP_NUM_THREADS" not in os.environ else {}


def command_of(job: Job, script: str, device: str) -> list[str]:
    """Return the command that trains or tests a run."""
    return [sys.executable, shown(PROJECT / script), *job.arguments(device)]


def command_text(job: Job, script: str, device: str) -> str:
    """Return the command as a shell takes it."""
    settings = [f"{name}={value}" for name, value in environment(device).items()]
    return " ".join([*settings, shlex.join(command_of(job, script, device))])


def devices(gpu: str, workers: int) -> list[str]:
    """Return the device of each worker, as `--gpu` of ASD.py takes it.

    Args:
        workers: for each device.
    Raises:
        UserError: there is no such device.
    """
    numbers = device_numbers(gpu)
    if numbers and not torch.cuda.is_available():
        logger.info("no CUDA device found: running on the CPU (--gpu cpu selects it explicitly)")
        numbers = []
    if numbers and max(numbers) >= (there := torch.cuda.device_count()):
        raise UserError(f"--gpu {gpu}: there are {there} CUDA devices: give 0 to {there - 1}")
    return [name for _ in range(workers) for name in (map(str, numbers) if numbers else ["cpu"])]


class Worker:
    """Runs the scripts of one run after another on its device."""

    def __init__(self, number: int, device: str) -> None:
        self.number, self.device = number, device
        self.job: Job | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.output: IO[bytes] | None = None
        self.start_of_output = 0
        self.scripts: deque[str] = deque()
        self.started = 0.0

    def begin(self, job: Job) -> None:
        """Start a run. Its output is appended to `output.log` in its folder, after the command."""
        self.job, self.scripts, self.started = job, deque(SCRIPTS), time.monotonic()
        job.run.saved.mkdir(parents=True, exist_ok=True)
        forget_failure(job)
        self.output = open(job.run.saved / OUTPUT, "ab")  # noqa: SIM115 - open while the run is in progress
        self.start_of_output = self.output.tell()
        self.launch()

    def launch(self) -> None:
        """Start the next script of the run, in a session of its own: Ctrl-C is passed on by the sweep."""
        assert self.job is not None and self.output is not None
        script = self.scripts[0]
        self.output.write(f"$ {command_text(self.job, script, self.device)}\n".encode("utf-8", "surrogateescape"))
        self.output.flush()
        guard = [sys.executable, "-I", "-S", str(child.__file__), str(os.getpid())]
        self.process = subprocess.Popen(
            [*guard, *command_of(self.job, script, self.device)],
            env=os.environ | environment(self.device),
            stdin=subprocess.DEVNULL, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def poll(self) -> bool:
        """Return whether the run has ended, well or not; starts its next script if there is one."""
        assert self.job is not None and self.process is not None and self.output is not None
        code = self.process.poll()
        if code is None:
            return False
        if code == 0:
            self.scripts.popleft()
            if self.scripts:
                self.launch()
                return False
        self.output.close()
        if code:
            mark_failed(self.job, self.reason(code), code, command_text(self.job, self.scripts[0], self.device))
        elif status_of(self.job).state != FINISHED:
            mark_failed(self.job, "exited with code 0, but the run is incomplete", 0, "")
        self.process = self.output = None
        return True

    def reason(self, code: int) -> str:
        """Return why the script failed, in one line."""
        assert self.job is not None
        if code < 0:
            return f"{self.scripts[0]}: ended by signal {-code} ({signal.strsignal(-code) or 'unknown'})"
        with open(self.job.run.saved / OUTPUT, "rb") as file:
            file.seek(self.start_of_output)
            return last_line(file.read().decode(errors="replace"))

    def stop(self) -> None:
        """Ask the child to stop."""
        if self.process is not None:
            self.process.terminate()

    def wait(self, deadline: float) -> None:
        """Wait until the child is gone; end it at the deadline, in `time.monotonic`'s seconds."""
        if self.process is not None:
            try:
                self.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.output is not None:
            self.output.close()


def run_all(jobs: Sequence[Job], workers: Sequence[Worker], progress: Progress) -> dict[str, str]:
    """Run all jobs in order, each on the first worker that is free; one that starts from another waits for it. However this
    ends, no child is left.

    Returns:
        the reason for each run, by name, that could not even be started, e.g. because its folder cannot be written.
    """
    queue, blocked = [*jobs], dict[str, str]()
    try:
        while queue or any(worker.job for worker in workers):
            for worker in workers:
                if worker.job is not None and worker.poll():
                    progress.ended(worker.number, worker.job, time.monotonic() - worker.started)
                    worker.job = None
                if worker.job is None and (ready := next_job(queue, workers)):
                    queue.remove(ready)
                    progress.began(worker.number, ready)
                    try:
                        worker.begin(ready)
                    except (OSError, UserError) as error:
                        worker.job, blocked[ready.name] = None, f"cannot be started: {one_line(error)}"
                        progress.ended(worker.number, ready, 0.0, blocked[ready.name])
            progress.show()
            time.sleep(POLL)
        return blocked
    finally:
        for worker in workers:
            worker.stop()
        deadline = time.monotonic() + PATIENCE
        for worker in workers:
            worker.wait(deadline)
        progress.close()


def next_job(queue: Sequence[Job], workers: Sequence[Worker]) -> Job | None:
    """Return the first job that does not start from a run which is still waiting or in progress."""
    unfinished = {job.name for job in (*queue, *(worker.job for worker in workers)) if job}
    return next((job for job in queue if job.start not in unfinished), None)


@contextlib.contextmanager
def locked(plan: Plan) -> Iterator[None]:
    """Hold the sweep's folder for the block, so that no second sweep starts the same runs. On a file system
    without locks only the locks of the individual runs protect against this.

    Raises:
        UserError: another process holds it.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with files.locked(plan.folder / LOCK, "is running this sweep: wait for it or stop it; --report shows how far it is"):
        yield
