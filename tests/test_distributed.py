"""Several processes on the CPU (gloo) compute the same as one process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY, TINY, run_script
from torch import nn

from data.sets import ImageSet
from engine.context import build_context
from engine.evaluation import infer
from engine.session import Session
from model.classifier import build_classifier
from utils.config import check_processes, load
from utils.draws import key_seed
from utils.errors import UserError
from utils.runtime.machine import Machine, device_numbers, start_processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def environment() -> dict[str, str]:
    """Return an environment with one thread for each process, and no CUDA."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    """Write the tiny configuration, with batches that two processes can share, into `folder`."""
    folder.mkdir(exist_ok=True)
    raw = TINY | {"saved_dir": str(folder / "saved_data"), "storage_dir": str(folder / "storage"), "num_epochs": 2} | changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the metrics of the run."""
    text = (folder / "saved_data" / name / "log" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    """Return the last checkpoint of the run."""
    path = folder / "storage" / name / "checkpoint" / "latest_model.pt"
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run (with synchronized BN) on one process and on two."""
    folder = tmp_path_factory.mktemp("runs")
    one = write_config(folder, "one", sync_bn=True)
    two = write_config(folder, "two", sync_bn=True)
    done = run_script("ASD.py", "--config", one, "--gpu", "cpu")
    assert done.returncode == 0, done.stderr
    command = [*TORCHRUN, str(REPOSITORY / "ASD.py"), "--config", str(two), "--gpu", "cpu"]
    both = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert both.returncode == 0, both.stderr
    assert "2 processes" in both.stdout and both.stdout.count("done: ACC") == 1, both.stdout
    (folder / "stderr.txt").write_text(both.stderr)
    return folder


def test_several_processes_run_without_warnings(runs: Path) -> None:
    """No process logs a deprecation warning."""
    lines = (runs / "stderr.txt").read_text().splitlines()
    assert [line for line in lines if "deprecat" in line.lower() or "FutureWarning" in line] == []


def test_two_processes_split_as_one_does(runs: Path) -> None:
    """The first split by losses (epoch 1) equals that of one process; the losses of the first steps are equal up to
    rounding."""
    one, two = rows(runs, "one"), rows(runs, "two")
    for key in ("loss", "loss_x", "loss_u", "lambda_u"):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-3, abs=1e-5), key
    pools = [checkpoint(runs, name)["clean_pool"] for name in ("one", "two")]
    assert len(pools[0]) == 40 and torch.equal(*pools)
    weights = [checkpoint(runs, name)["model_state_dict"]["backbone.conv1.weight"] for name in ("one", "two")]
    assert torch.allclose(*weights, atol=5e-3)


def test_a_checkpoint_of_two_processes_resumes_on_one(runs: Path) -> None:
    """A checkpoint does not depend on the number of processes."""
    path = runs / "two.yaml"
    longer = run_script("ASD.py", "--config", path, "--gpu", "cpu", "--set", "num_epochs=3")
    assert longer.returncode == 0, longer.stderr
    assert "resuming after epoch 2/3" in longer.stdout
    assert [r["epoch"] for r in rows(runs, "two")] == list(range(3))


SCRIPT = """
import sys, torch, torch.distributed as dist
from torch import nn
from model.sync_norm import synchronize
from utils.runtime.machine import choose_machine

machine = choose_machine("cpu", False)
torch.manual_seed(0)
layers = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2), nn.BatchNorm1d(2)
net = nn.Sequential(*layers).double()
images = torch.randn(7, 2, 6, 6, dtype=torch.float64)
model = machine.wrap(synchronize(net, machine.device))
mine = machine.shard(7)
out = machine.all_gather(model(images[mine]), 7)
machine.backward(out.pow(3).sum() / 7)
grads = torch.cat([p.grad.flatten() for p in net.parameters()])
plain = [torch.cat([getattr(net[i], name) for i in (1, 5)]) for name in ("running_mean", "running_var")]
net[1].running_mean.add_(machine.rank)
machine.average_buffers(net)
torch.save([out.detach(), grads, *plain, net[1].running_mean], f"{sys.argv[1]}/{machine.rank}.pt")
assert machine.all_reduce(torch.tensor(2.0 + machine.rank)).item() == 5
machine.leave()
"""


def test_gradients_and_statistics_are_those_of_one_process(tmp_path: Path) -> None:
    """7 rows on 2 processes with synchronized BN give the outputs, gradients and running statistics of one process, on all
    ranks."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [*TORCHRUN, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2), nn.BatchNorm1d(2)
    ).double()
    images = torch.randn(7, 2, 6, 6, dtype=torch.float64)
    out = net(images)
    (out.pow(3).sum() / 7).backward()
    grads = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    for rank in range(2):
        got_out, got_grads, mean, variance, averaged = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(got_out, out.detach(), rtol=1e-10)
        assert torch.allclose(got_grads, grads, rtol=1e-9, atol=1e-12)
        for name, found in (("running_mean", mean), ("running_var", variance)):
            assert torch.allclose(found, torch.cat([net.get_buffer(f"{i}.{name}") for i in (1, 5)]))
        assert torch.allclose(averaged, net[1].running_mean + 0.5)  # the mean of + 0 and + 1


def test_processes_without_a_common_folder_are_refused(tmp_path: Path) -> None:
    """If rank 1 does not find the run that rank 0 resumes, both end with one line, and no checkpoint is written."""
    places = [tmp_path / "zero", tmp_path / "one"]
    for place in places:
        write_config(place, "apart", num_epochs=1, saved_dir="saved", storage_dir="storage")
    options = [str(REPOSITORY / "ASD.py"), "--config", "apart.yaml", "--gpu", "cpu"]
    subprocess.run([sys.executable, *options], env=environment(), cwd=places[0], check=True, capture_output=True)
    latest = places[0] / "storage/apart/checkpoint/latest_model.pt"
    before = latest.read_bytes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, *options, "--set", "num_epochs=2"], cwd=place, stderr=subprocess.PIPE, text=True,
            env=environment() | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, place in enumerate(places)
    ]  # fmt: skip
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2 and "saved_dir: saved: the processes do not find the same run" in errors, errors
    assert latest.read_bytes() == before and not list(places[1].rglob("*.pt"))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_fewer_images_than_processes(tiny: Path, rank: int) -> None:
    """Each process then computes all logits, without waiting for the others."""
    settings, images = load(tiny), ImageSet(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    context = build_context(settings, Machine(torch.device("cpu"), rank=rank, world_size=3), images)
    model = build_classifier(settings.network, settings.num_classes, 0)
    assert infer(context, "test", model, images).shape == (2, 10)


def children(pid: int) -> list[int]:
    """Return the child processes of a process."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text() if Path(f"/proc/{pid}").exists() else ""
    return [int(p) for p in text.split()]


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    """kill -9 of one process ends the whole run within a minute, and a message names the rank."""
    path = write_config(tmp_path, "killed", num_epochs=6, sync_bn=True)
    raw = yaml.safe_load(path.read_text())
    raw["semi"]["mixmatch"]["train_iteration"] = 2000
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    command = [*TORCHRUN, str(REPOSITORY / "ASD.py"), "--config", str(path), "--gpu", "cpu"]
    engine = subprocess.Popen(
        command, env=environment(), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        log = tmp_path / "saved_data" / "killed" / "log" / "asd.log"
        deadline = time.monotonic() + 90
        while not (log.exists() and "parameters" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(2)
        workers = children(engine.pid)
        assert len(workers) == 2
        last = max(workers, key=lambda pid: int(rank_of(pid)))
        os.kill(last, signal.SIGKILL)
        started = time.monotonic()
        _, errors = engine.communicate(timeout=60)
        assert time.monotonic() - started < 60 and engine.returncode != 0
        assert "rank" in errors and "1" in errors and "-9" in errors, errors[-2000:]
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    finally:
        engine.kill()


def rank_of(pid: int) -> str:
    """Return the RANK in the environment of a process."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(p.partition(b"=")[2].decode() for p in pairs if p.startswith(b"RANK="))


@pytest.mark.parametrize("count", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_shares_cover_every_row_once(count: int, size: int) -> None:
    """The shards of the processes are disjoint, in order, complete, and differ by at most one row."""
    parts = [list(range(count))[Machine(torch.device("cpu"), rank=r, world_size=size).shard(count)] for r in range(size)]
    assert [row for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_batch_that_cannot_be_shared_is_refused(tiny: Path) -> None:
    """A batch size is the total over all processes and must be a multiple of their number."""
    settings = load(tiny)
    check_processes(settings, 2)
    check_processes(load(tiny, ["undefended.batch_size=9"]), 2)  # ASD does not read it
    with pytest.raises(UserError, match=r"semi\.loader\.batch_size: 9: .*multiple of 2"):
        check_processes(load(tiny, ["semi.loader.batch_size=9"]), 2)
    with pytest.raises(UserError, match=r"defense\.dbd\.simclr_batch_size: 33: .*multiple of 2"):
        check_processes(load(tiny, ["defense={dbd: {simclr_batch_size: 33}}"]), 2)
    with pytest.raises(UserError, match=r"loader\.batch_size: 2: must be a multiple of 2, .* and at least 4"):
        check_processes(load(tiny, ["loader.batch_size=2"]), 2)  # one image each, on which batch normalization cannot train
    with pytest.raises(UserError, match=r"loader\.batch_size: 1: out of range; .* >= 2"):
        load(tiny, ["loader.batch_size=1"])


def test_each_process_and_each_epoch_has_its_own_dropout() -> None:
    """The same mask for the same row of every part of a batch would make its images less independent than on one device; the
    same masks in every epoch would never train the dropped units together."""
    drawn = {}
    for rank in range(2):
        place = SimpleNamespace(
            state=SimpleNamespace(epoch=0),
            context=SimpleNamespace(
                config=SimpleNamespace(epochs=2, seed=SimpleNamespace(seed=7)), machine=SimpleNamespace(rank=rank)
            ),
            defense=SimpleNamespace(begin_epoch=lambda state, epoch: None),
        )
        for epoch in Session.epochs(place):  # type: ignore[arg-type]
            drawn[rank, epoch] = torch.rand(4)
    assert len({tuple(numbers.tolist()) for numbers in drawn.values()}) == 4
    for epoch in range(2):
        torch.manual_seed(key_seed(7, "torch", epoch))
        assert torch.equal(drawn[0, epoch], torch.rand(4))  # as on one device, and when resumed


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("runtime.mode", ["runtime.mode=graph"]),
        ("runtime.compile", ["runtime.compile=true"]),
        ("runtime.merged", ["runtime.merged=true", "runtime.compile=true"]),
    ],
)
@pytest.mark.parametrize("sync_bn", ["true", "false"])
def test_a_step_of_one_process_is_refused_before_several_start(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, key: str, settings: list[str], sync_bn: str
) -> None:
    """A captured, compiled or merged step supports one process: with several, one line names the key, and none is started."""
    config = load(tiny, [*settings, f"sync_bn={sync_bn}"])
    check_processes(config, 1)
    started: list[Any] = []
    monkeypatch.setattr("torch.distributed.run.main", started.append)
    for name, fact in {"is_available": True, "device_count": 2, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, fact=fact: fact)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError) as caught:
        start_processes("0,1", lambda count: check_processes(config, count))
    assert str(caught.value).startswith(f"{key}: ") and "\n" not in str(caught.value) and started == []
    with pytest.raises(SystemExit):
        start_processes("0,1", lambda count: check_processes(load(tiny), count))
    assert len(started) == 1 and "--nproc_per_node=2" in started[0]


def test_the_same_device_twice_is_refused() -> None:
    """`--gpu 0,0` would put two processes on one device."""
    assert device_numbers("0, 2") == [0, 2] and device_numbers("cpu") == []
    with pytest.raises(UserError, match="--gpu 0,0: "):
        device_numbers("0,0")


def test_a_graph_is_for_one_cuda_device() -> None:
    """`auto` and `graph` mean a captured step on a single CUDA device; never on a CPU or with several processes."""
    one, several, cpu = (
        Machine(torch.device("cuda", 0)),
        Machine(torch.device("cuda", 0), world_size=2),
        Machine(torch.device("cpu")),
    )
    assert one.uses_graph("graph") and one.uses_graph("auto") and not one.uses_graph("eager")
    assert not any(machine.uses_graph(mode) for machine in (several, cpu) for mode in ("auto", "graph", "eager"))


VIRTUAL = """
import sys, torch, ASD
from data.sets import ImageSet
from engine.context import build_context, place
from model.classifier import build_classifier
from utils.config import load
from utils.runtime.machine import choose_machine

settings = load(sys.argv[1], ["sync_bn=true", "loader.batch_size=16", "meta.optimizer={SGD: {lr: 0.05}}"])
machine = choose_machine("cpu", False)
pixels = torch.randint(0, 256, (45, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
context = build_context(settings, machine, ImageSet(pixels, torch.arange(45) % 10))
model = place(build_classifier(settings.network, 10, 1), settings, machine)
virtual = ASD.train_virtual_model(context, 4, model)
torch.save(dict(virtual.state_dict()), f"{sys.argv[2]}/{machine.rank}-of-{machine.world_size}.pt")
machine.leave()
"""


def test_the_virtual_model_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """All ranks have the same one, up to rounding that of a single process: the meta-split compares losses of one model."""
    script, path = tmp_path / "virtual.py", write_config(tmp_path, "virtual")
    script.write_text(VIRTUAL)
    command = [*TORCHRUN, str(script), str(path), str(tmp_path)]
    both = subprocess.run(command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    alone = run_script(str(script), path, tmp_path)
    assert both.returncode == alone.returncode == 0, both.stderr + alone.stderr
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("0-of-1", "0-of-2", "1-of-2"))
    for name, tensor in one.items():
        for rank in two:
            assert torch.allclose(tensor.float(), rank[name].float(), atol=1e-4), name
