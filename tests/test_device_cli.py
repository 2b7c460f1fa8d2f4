"""The device, the machine, and the command line of both scripts."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from utils import cli, config
from utils.errors import UserError
from utils.runtime import machine
from utils.runtime.machine import Machine, choose_device, choose_machine


@pytest.mark.parametrize("text", ["cpu", "CPU", " cpu "])
def test_the_cpu_can_be_asked_for(said: list[str], text: str) -> None:
    """`--gpu cpu` computes on the CPU, even if there is a GPU, without a log line."""
    assert choose_device(text, 0) == torch.device("cpu") and said == []


@pytest.mark.parametrize("text", ["gpu", "-1", "0,,1", "1.0", "", "cuda:0", "0x1", "²"])
def test_an_invalid_gpu_is_refused(said: list[str], text: str) -> None:
    """A value other than numbers or `cpu` is refused in one line with the legal values."""
    with pytest.raises(UserError) as caught:
        choose_device(text, 0)
    line = str(caught.value)
    assert line.startswith(f"--gpu {text}:") and "cpu" in line and "\n" not in line


@pytest.mark.parametrize("number", ["0", "3"])
def test_without_cuda_the_cpu_computes(monkeypatch: pytest.MonkeyPatch, said: list[str], number: str) -> None:
    """The original's `--gpu 0` runs on a machine without CUDA, and one line names the device used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(number, 0) == torch.device("cpu")
    assert len(said) == 1 and "CPU" in said[0] and "\n" not in said[0]


def test_with_cuda_the_numbered_device_computes(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    """`--gpu 1` is the second CUDA device; a missing device is refused with the existing numbers."""
    made_current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    assert choose_device("1", 0) == torch.device("cuda", 1)
    assert made_current == [] and said == []  # nothing is allocated there by the parent of several processes
    assert choose_machine("1", False, alone=True).device == torch.device("cuda", 1)
    assert made_current == [torch.device("cuda", 1)] and said == []
    with pytest.raises(UserError, match=r"--gpu 2: .*0\.\.1"):
        choose_device("2", 0)
    assert [choose_device(gpu, 1).index for gpu in ("0", "1,0")] == [1, 0]
    with pytest.raises(UserError, match="--gpu 0,1: 2 devices for more processes"):
        choose_device("0,1", 2)


def small_network() -> nn.Module:
    """Return a convolution, BN and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


@pytest.mark.parametrize("amp", [False, True])
def test_every_weight_learns_after_a_pass_without_gradient(amp: bool) -> None:
    """Guessing labels and training in one autocast context leave no weight without a gradient."""
    model, images = small_network(), torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    machine = Machine(torch.device("cpu"), amp)
    images = machine.to_memory_format(images)
    with machine.autocast():
        with torch.no_grad():
            model(images)
        logits = model(images)
    assert logits.dtype == (torch.bfloat16 if amp else torch.float32)
    logits.float().square().mean().backward()
    exact = small_network()
    exact(images)
    exact(images).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32, name
        assert q.grad is not None
        if name != "0.bias":  # BN takes the convolution's bias away: its gradient is rounding alone
            assert float((p.grad - q.grad).norm()) <= (0.05 if amp else 0.0) * float(q.grad.norm()), name


def test_weights_are_cast_once_for_all_passes_without_gradient() -> None:
    """If a context casts each weight to bf16 once, two passes without gradient give equal logits bit for bit, and all
    weights of a later pass with gradient get one."""
    casts: Counter[tuple[int, ...]] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default:
                casts[tuple(args[0].shape)] += 1
            return func(*args, **(kwargs or {}))

    machine, model = Machine(torch.device("cpu"), amp=True), small_network()
    images = machine.to_memory_format(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    logits = []
    for once in (False, True):
        casts.clear()
        with Watch(), torch.no_grad(), machine.autocast(cast_once=once):
            logits.append([model(images), model(images)])
        assert casts[8, 3, 3, 3] == casts[4, 8 * 36] == (1 if once else 2)
        assert casts[tuple(images.shape)] == 2
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))
    with machine.autocast():
        model(images).float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_batches_of_inference() -> None:
    """On CUDA inference takes 1,024 images at once by default, fewer with a smaller batch size; on a CPU the batch size is
    the configured one."""
    cuda, cpu = Machine(torch.device("cuda", 0)), Machine(torch.device("cpu"))
    assert cuda.inference_batch(config.Loader().batch_size) == 1024
    assert [cuda.inference_batch(2), cpu.inference_batch(2), cpu.inference_batch(128)] == [16, 2, 128]
    large = 224 * 224  # no more pixels at a time than with small images, but at least a batch
    assert [cuda.inference_batch(n, large) for n in (2, 8, 256)] == [16, 20, 256]


@pytest.mark.parametrize("amp", [False, True])
def test_the_layout_changes_no_pixel(amp: bool) -> None:
    """Conversion to the memory format keeps the pixels; on a CPU it is channels_last, also in fp32."""
    images = torch.randn(2, 3, 5, 7)
    out = Machine(torch.device("cpu"), amp).to_memory_format(images)
    assert torch.equal(out, images) and out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("device", "amp", "last"), [("cpu", False, True), ("cuda", False, False), ("cuda", True, True)])
def test_the_memory_format_of_each_device(device: str, amp: bool, last: bool) -> None:
    """channels_last is used for every CPU run and for bf16 on CUDA."""
    assert (Machine(torch.device(device), amp).memory_format == torch.channels_last) == last


@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize("amp", [False, True])
def test_amp_falls_back_where_bf16_is_slow(monkeypatch: pytest.MonkeyPatch, said: list[str], amp: bool, has: bool) -> None:
    """--amp on a device without bf16 runs in fp32 and logs a line; otherwise nothing is logged."""
    monkeypatch.setattr(machine, "has_bf16", lambda chosen: has)
    assert choose_machine("cpu", amp).amp == (amp and has)
    assert len(said) == (amp and not has)
    if said:
        assert "--amp" in said[0] and "fp32" in said[0] and "\n" not in said[0]


def test_bf16_of_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA devices have bf16 from compute capability 8.0 on."""
    for capability, expected in {(7, 5): False, (8, 0): True, (9, 0): True}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda chosen, c=capability: c)
        assert machine.has_bf16(torch.device("cuda", 0)) == expected


def test_determinism_switches_are_set() -> None:
    """`seed.deterministic` turns off cuDNN's search for fast kernels, regardless of `seed.benchmark`."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    try:
        for deterministic, benchmark in ((True, True), (True, False), (False, True), (False, False)):
            machine.set_determinism(deterministic, benchmark)
            assert torch.backends.cudnn.deterministic == torch.are_deterministic_algorithms_enabled() == deterministic
            assert torch.backends.cudnn.benchmark == (benchmark and not deterministic)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before[1:]


def test_the_originals_command_line_is_understood() -> None:
    """The original's options are read; omitted ones have the documented defaults."""
    args = cli.parse_arguments("", ["--config", "a.yaml", "--resume", "False", "--gpu", "1"], True)
    assert (args.config, args.resume, args.gpu, args.set) == ("a.yaml", "False", "1", [])
    args = cli.parse_arguments("", [], False)
    assert (args.config, args.resume, args.gpu, args.set) == ("config/baseline_asd.yaml", "", "0", [])
    args = cli.parse_arguments("", ["--set", "a=1", "--amp", "--set", "b.c=2=3"], True)
    assert sorted(args.set) == ["a=1", "b.c=2=3", "runtime.amp=true"]


@pytest.mark.parametrize("flag", ["--world-size", "--rank", "--dist-port"])
@pytest.mark.parametrize("form", ["{} 2", "{}=2", "{} 0"])
def test_the_originals_process_flags_are_torchruns(flag: str, form: str) -> None:
    """The options that torchrun replaces are refused with a line that explains it."""
    with pytest.raises(UserError) as caught:
        cli.parse_arguments("", form.format(flag).split(), True)
    assert str(caught.value).startswith(flag) and "torchrun" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--confg", "x"], "--confg"),
        (["--conf", "x"], "--conf"),
        (["extra"], "extra"),
        (["--config"], "--config"),
        (["--set"], "--set"),
        (["--amp=1"], "--amp"),
    ],
)
def test_an_unknown_option_is_one_line(argv: list[str], expected: str) -> None:
    """An option that does not exist, is abbreviated, or lacks its value is refused in one line that refers to --help."""
    with pytest.raises(UserError) as caught:
        cli.parse_arguments("", argv, True)
    assert expected in str(caught.value) and "--help" in str(caught.value) and "\n" not in str(caught.value)


def leave(main: Callable[[], None], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Run a script with this main function; return its exit code and standard error."""
    with pytest.raises(SystemExit) as caught:
        cli.command("x.py", main)
    return caught.value.code, capsys.readouterr().err


def raising(error: BaseException) -> Callable[[], None]:
    """Return a main function that raises an error."""

    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (UserError("a.yaml: key: 3: mend it"), 2, "x.py: error: a.yaml: key: 3: mend it\n"),
        (OSError(errno.ENOSPC, "No space left on device", "log/asd.log"), 2, "log/asd.log"),
        (OSError(errno.EFBIG, "File too large"), 2, "disk is full"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "batch_size"),
        (MemoryError(), 2, "batch size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 2, "batch size"),
        (KeyboardInterrupt(), 130, "x.py: stopped."),
    ],
)
def test_a_user_error_is_one_line(error: BaseException, code: int, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A user error, a full disk, a full device and Ctrl-C end in one line and their exit code."""
    got, text = leave(raising(error), capsys)
    assert got == code and expected in text and text.strip().count("\n") == 0 and "Traceback" not in text


@pytest.mark.parametrize("error", [ValueError("defect"), OSError(errno.EIO, "Input/output error"), AssertionError()])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    """A bug of the program is not reported as a user error."""
    with pytest.raises(type(error)):
        cli.command("x.py", raising(error))


SCRIPT = """
import sys, time
from utils.cli import command, parse_arguments

def main():
    args = parse_arguments("", sys.argv[1:], True)
    print("ready", flush=True)
    if args.gpu == "9":
        time.sleep(60)

command("x.py", main)
"""


def start(*argv: str) -> subprocess.Popen[str]:
    """Start a script that parses its options and, with --gpu 9, waits."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *argv],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_exit_codes_of_a_process() -> None:
    """The exit code is 0 for success, 2 with one line for a user error, 130 with one line for Ctrl-C; never a traceback."""
    processes = {name: start(*argv) for name, argv in {"fine": [], "wrong": ["--rank", "0"], "stopped": ["--gpu", "9"]}.items()}
    try:
        stopped = processes["stopped"]
        assert stopped.stdout is not None and stopped.stdout.readline() == "ready\n"
        stopped.send_signal(signal.SIGINT)
        out = {name: (*process.communicate(timeout=120), process.returncode) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    assert out["fine"] == ("ready\n", "", 0)
    assert out["wrong"][0] == "" and out["wrong"][2] == 2
    assert out["wrong"][1].startswith("x.py: error: --rank: ") and out["wrong"][1].count("\n") == 1
    assert out["stopped"][2] == 130 and out["stopped"][1].strip().count("\n") == 0 and "x.py: stopped" in out["stopped"][1]


def test_a_closed_output_pipe_is_not_an_error() -> None:
    """If the program that reads the output exits, there is no traceback."""
    script = "from utils.cli import command\ndef main():\n    for i in range(99999): print('line', i)\ncommand('x.py', main)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    text = process.stderr.read()
    process.wait(60)
    process.stderr.close()
    assert "Traceback" not in text and process.returncode == 141
