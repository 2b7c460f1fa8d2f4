"""A run's state: all that may influence its further course, in one small object, written and read as one file.

A checkpoint is untrusted input: it is read with `weights_only=True`, so nothing in it can run code.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
import zipfile
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.config import Config
from utils.errors import UserError
from utils.files import write_atomically
from utils.manifest import differences, other_data
from utils.paths import is_dir, is_file
from utils.schema import Reader, as_dict
from utils.stepper import Stepper, changed_tensors

# Settings that may differ between the run that wrote a checkpoint and the one that goes on from it.
FREE = (
    "run", "saved_dir", "storage_dir", "dataset_dir", "download", "prefetch", "num_epochs", "global.epoch_third", "runtime",
    "sync_bn", "criterion", "seed.deterministic", "seed.benchmark", "loader.num_workers", "loader.pin_memory",
    "semi.loader.num_workers", "semi.loader.pin_memory", "data.placement", "data.cache_dir", "evidence",
)  # fmt: skip

# What a numpy scalar in a checkpoint needs: the function that rebuilds it, under both of its module names, and dtypes.
REBUILD = np.float64(0).__reduce__()[0]
KINDS = (np.float64, np.float32, np.int64, np.int32, np.bool_)
NUMPY_SCALARS: list[Any] = [
    (REBUILD, "numpy.core.multiarray.scalar"), (REBUILD, "numpy._core.multiarray.scalar"), np.dtype,
    *(type(np.dtype(kind)) for kind in KINDS),
]  # fmt: skip


@dataclass
class State:
    """Where a run stands. Random draws are functions of (seed, epoch), so no generator is part of it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    epoch: int = 0  # the next epoch to run, 0-based
    best_acc: float = 0.0
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # one row an epoch, as in metrics.jsonl
    clean_pool: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # of the last epoch
    epochs_in_clean_pool: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))  # (N,)
    about: dict[str, Any] = field(default_factory=dict)  # class names and image size: for test.py --images, not for training
    data: str = ""  # the manifest of the run's data (`utils/manifest.py`)
    parallel: Any = None  # the model as training calls it: wrapped where there are several processes; not saved
    steps: Stepper | None = None  # runs the training steps; not saved

    def __post_init__(self) -> None:
        self.parallel = self.parallel or self.model

    def tensors(self) -> dict[str, list[Tensor]]:
        """Return all tensors that training changes in place, by kind: weights, BN statistics, the optimizer's moments."""
        return changed_tensors(self.model, self.optimizer)


def contents(state: State, config: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint holds of a finished epoch, as the state has it: its tensors, not copies."""
    saved = {
        "epoch": state.epoch - 1,  # as the authors count: the 0-based epoch that was finished
        "result": state.history[-1] if state.history else {},
        "model_state_dict": state.model.state_dict(),
        "optimizer_state_dict": state.optimizer.state_dict(),
        "best_acc": state.best_acc,
        "best_epoch": state.best_epoch,
        "history": state.history,
        "clean_pool": state.clean_pool,
        "epochs_in_clean_pool": state.epochs_in_clean_pool,
        "config": config,
        "about": state.about,
        "data": state.data,
    }
    if state.scheduler is not None:
        saved["scheduler_state_dict"] = state.scheduler.state_dict()
    return saved


def save(path: Path, state: State, config: dict[str, Any]) -> None:
    """Write the state of a finished epoch atomically."""
    write(path, contents(state, config))


def write(path: Path, saved: dict[str, Any], also: Sequence[Path] = ()) -> None:
    """Write a checkpoint's dictionary atomically, under several names if need be (`write_atomically`)."""
    buffer = io.BytesIO()  # torch writes to memory, so that a full disk is an ordinary OSError
    torch.save(saved, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()), also)


class Writer:
    """Writes checkpoints in a thread of its own while training goes on; leaving the `with` block waits for the last one.

    There is one write at a time. An error of the thread is raised by the next call, or on leaving the block.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future[None] | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()
        self.wait()

    def save(
        self,
        path: Path,
        state: State,
        config: dict[str, Any],
        also: Sequence[Path] = (),
        then: Callable[[], object] = lambda: None,
    ) -> None:
        """Copy the state of a finished epoch to the host, which the caller waits for, and begin to write it.

        Args:
            also: further names of the same checkpoint; they are there before `path` is.
            then: called in the thread once all names are there.
        Raises:
            UserError: the checkpoint before this one could not be written.
        """
        self.wait()
        self.pending = self.pool.submit(self.write, path, copy_to_host(contents(state, config)), also, then)

    @staticmethod
    def write(path: Path, saved: dict[str, Any], also: Sequence[Path], then: Callable[[], object]) -> None:
        """What the thread does."""
        write(path, saved, also)
        then()

    def wait(self) -> None:
        """Wait until nothing is being written; raise the thread's error, once."""
        if self.pending is not None:
            wait([self.pending])  # Ctrl-C here leaves it pending
            done, self.pending = self.pending, None
            done.result()


def copy_to_host(tree: Any) -> Any:
    """Return a copy of nested containers in which every tensor is a copy in host memory; other values are shared."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        out = copy.copy(tree)  # an OrderedDict with torch's notes on versions keeps them
        for key, value in tree.items():
            out[key] = copy_to_host(value)
        return out
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(copy_to_host, tree))
    return tree


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint's dictionary on the CPU; names of weights as the plain network has them (`plain_name`).

    Raises:
        UserError: missing, unreadable, truncated, no checkpoint, or one that asks for more than tensors and plain values.
    """
    listing = is_dir(path.parent, "--resume")
    there = sorted(p.name for p in path.parent.glob("*.pt") if p != path) if listing else []
    if not is_file(path, "--resume"):
        listed = f"there are {', '.join(there)}" if there else "there is none: train first with ASD.py"
        raise UserError(f"--resume {path}: no such checkpoint: {listed}")
    other = f"use another one: {', '.join(there)}" if there else "train again with ASD.py --resume False"
    broken = UserError(f"{path}: is truncated or no checkpoint: {other}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_SCALARS):  # the authors' figures are numpy's
            warnings.simplefilter("ignore")  # of torch, about the pickle's age
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "GLOBAL " in reason or "call reduce" in reason:
            raise UserError(f"{path}: asks for code that no checkpoint needs: it may be malicious; do not use it") from None
        raise broken from None
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): make it readable") from None
    except (
        RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError,
        OverflowError, MemoryError, AssertionError, ImportError,
    ):  # fmt: skip
        raise broken from None
    weights = loaded.get("model_state_dict") if isinstance(loaded, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(t, Tensor) for t in weights.values()):
        raise UserError(f"{path}: holds no model_state_dict: is it a checkpoint of ASD.py?")
    loaded["model_state_dict"] = {plain_name(str(key)): tensor for key, tensor in weights.items()}
    return dict(loaded)


def plain_name(key: str) -> str:
    """Return a weight's name without what wrappers add: `module.` in front (distributed), `_orig_mod` anywhere (compiled)."""
    parts = [part for part in key.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def epochs(path: Path) -> int:
    """Return how many epochs a checkpoint has; 0 where there is none that can be read."""
    try:
        return int(read(path)["epoch"]) + 1
    except (UserError, KeyError, ValueError, TypeError):
        return 0


def about(saved: dict[str, Any]) -> tuple[tuple[str, ...], tuple[int, int] | None]:
    """Return the class names that a checkpoint tells, and the height and width of its training images; old ones do not."""
    told = saved.get("about")
    told = told if isinstance(told, dict) else {}
    names, size = told.get("class_names"), told.get("image_size")
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    sized = isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and 0 < side <= 4096 for side in size)
    return tuple(names or ()) if known else (), (size[0], size[1]) if sized and size else None


def load_weights(model: nn.Module, saved: dict[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into the model; `UserError` where they are another network's."""
    own, given = model.state_dict(), saved["model_state_dict"]
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        odd = f"lacks {missing[0]}" if missing else f"has {extra[0]}"
        raise UserError(f"{path}: is a checkpoint of another network ({odd}): give the YAML that it was trained with")
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{path}: is a checkpoint of another network ({name} is {tuple(tensor.shape)}, the YAML's network has "
                f"{tuple(own[name].shape)}): give the YAML that it was trained with"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds values that are not finite: use an earlier checkpoint")
    model.load_state_dict(given)


def load(path: Path, state: State, config: dict[str, Any], saved: dict[str, Any] | None = None) -> None:
    """Go on from a checkpoint: fill the state from the file.

    Args:
        state: of a run before its first epoch, with the manifest of its data.
        saved: the file's contents, if they were read, and their settings compared, before.
    Raises:
        UserError: as `read`, and where the checkpoint is of other settings or other data.
    """
    if saved is None:
        saved = read(path)
        refuse_other_settings(path, saved, config)
    count = len(state.epochs_in_clean_pool)  # N
    refuse_other_data(path, saved, state.data)
    load_weights(state.model, saved, path)
    try:
        state.epoch = int(saved["epoch"]) + 1
        state.best_acc, state.best_epoch = float(saved.get("best_acc", 0)), int(saved.get("best_epoch", 0))
        load_optimizer(state.optimizer, saved["optimizer_state_dict"])
        if state.scheduler is not None:
            state.scheduler.load_state_dict(saved["scheduler_state_dict"])
        state.history = [dict(row) for row in saved.get("history", [])]
        state.clean_pool = saved.get("clean_pool", state.clean_pool)
        state.epochs_in_clean_pool = saved.get("epochs_in_clean_pool", state.epochs_in_clean_pool)
        check_state(state, count)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: its training state does not fit ({type(error).__name__}: {error}): use another checkpoint, or "
            "--resume False to start over"
        ) from None


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load an optimizer's state; how it is computed (CUDA graph, fused kernels, memory layout) stays this run's own."""
    for group, given in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        given.update({key: group[key] for key in ("capturable", "fused", "foreach") if key in group})
        rate = float(given["lr"])
        given["lr"] = torch.tensor(rate, device=group["lr"].device) if isinstance(group["lr"], Tensor) else rate
    optimizer.load_state_dict(saved)
    for parameter, moments in optimizer.state.items():  # in the checkpoint's memory layout: fused kernels want the weights'
        for name, moment in moments.items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape and moment.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=moment.dtype, requires_grad=False).copy_(moment)


def check_state(state: State, count: int) -> None:
    """Raise ValueError where a loaded state does not fit the run; a training set has `count` images."""
    rows = [row["epoch"] for row in state.history]  # a run that goes on from an authors' checkpoint has none of its epochs
    if state.epoch < 1 or rows != list(range(state.epoch - len(rows), state.epoch)) or len(rows) > state.epoch:
        raise ValueError(f"epoch {state.epoch - 1} with a history of the epochs {rows[:1]} to {rows[-1:]}")
    pool, epochs = state.clean_pool, state.epochs_in_clean_pool
    if pool.dtype != torch.int64 or pool.ndim != 1 or (len(pool) and not 0 <= int(pool.min()) <= int(pool.max()) < count):
        raise ValueError("clean_pool holds no indices of the training set")
    if epochs.dtype != torch.int32 or epochs.shape != (count,):
        raise ValueError(f"epochs_in_clean_pool is {epochs.dtype} {tuple(epochs.shape)} for {count} images")
    for parameter, moments in state.optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(f"the optimizer's {name} is {tuple(value.shape)} for weights {tuple(parameter.shape)}")


def refuse_other_settings(path: Path, saved: dict[str, Any], config: dict[str, Any], stand_ins: Collection[str] = ()) -> None:
    """Refuse a checkpoint whose stored configuration differs where it matters; the authors' files store none.

    Args:
        saved: the checkpoint.
        stand_ins: settings that only name what the manifest compares by content (`utils.schema.stand_ins`). They are compared
            as text where the checkpoint has no manifest, as those of earlier versions.
    """
    if not isinstance(saved.get("config"), dict):
        return
    then, now = flatten(completed(saved["config"])), flatten(config)
    free = [*FREE, *(stand_ins if saved.get("data") else ())]
    schedule = "lr_scheduler" if now.get("defense") == "asd" else "undefended.lr_scheduler"
    if now.get(schedule, {}) is not None:  # it may follow num_epochs; with a constant rate a run may be made longer
        free.remove("num_epochs")
    for key in [*now, *(k for k in then if k not in now)]:
        if any(key == f or key.startswith(f + ".") for f in free) or then.get(key) == now.get(key):
            continue
        raise UserError(
            f"{path}: was written with {key}: {then.get(key)!r} and the configuration says {now.get(key)!r}: set it back, or "
            "begin a new run: with --set run=NAME and without --resume, or with --resume False"
        )


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with the defaults of settings that were added since it was written."""
    try:
        read_config: Config = Reader(lambda key: "").section(Config, config)
    except UserError:  # it has a setting that is gone: the comparison names it
        return config
    complete: dict[str, Any] = as_dict(read_config)
    return complete


def refuse_other_data(path: Path, saved: dict[str, Any], data: str) -> None:
    """Refuse a checkpoint of other data; those of earlier versions and the authors' do not say which data they are of.

    Args:
        data: the manifest of this run.
    """
    known = saved.get("data")
    changed = differences(known, data) if isinstance(known, str) and known and data else []
    if changed:
        raise other_data(str(path), "was written", changed)


def flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return {"a.b": value} for nested dictionaries; an empty one counts as a value."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        at = f"{path}.{key}" if path else str(key)
        if isinstance(value, dict) and value:
            out |= flatten(value, at)
        else:
            out[at] = value
    return out
