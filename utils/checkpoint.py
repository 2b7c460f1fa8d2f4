"""The state of a run: everything that affects the rest of it, in one small object that is written and read as one file.

Checkpoints are untrusted input: they are read with `weights_only=True`, so nothing in them can run code.
"""

from __future__ import annotations

import copy
import io
import lzma
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.config.compatibility import refuse_other_data, refuse_other_settings
from utils.errors import UserError, kind_of
from utils.files import write_atomically
from utils.paths import is_file
from utils.runtime.stepper import Stepper, changed_tensors

# Needed to read numpy scalars in a checkpoint: the function that rebuilds them, under both of its module names, and dtypes.
REBUILD = np.float64(0).__reduce__()[0]
KINDS = (np.float64, np.float32, np.int64, np.int32, np.bool_)
NUMPY_SCALARS: list[Any] = [
    (REBUILD, "numpy.core.multiarray.scalar"), (REBUILD, "numpy._core.multiarray.scalar"), np.dtype,
    *(type(np.dtype(kind)) for kind in KINDS),
]  # fmt: skip


@dataclass
class State:
    """The state of a run. It holds no random generator, because random draws are functions of (seed, epoch)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None
    epoch: int = 0  # the next epoch to run, 0-based
    best_acc: float = 0.0
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # one row an epoch, as in metrics.jsonl
    clean_pool: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # of the last epoch
    epochs_in_clean_pool: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))  # (N,)
    networks: dict[str, nn.Module] = field(default_factory=dict)  # of a defense, beside the model
    sets: dict[str, Tensor] = field(default_factory=dict)  # of a defense: indices (n,) int64 of training images, on the CPU
    tables: dict[str, Tensor] = field(default_factory=dict)  # of a defense: any other tensors, on the CPU
    about: dict[str, Any] = field(default_factory=dict)  # class names and image size, for test.py --images
    data: str = ""  # the manifest of the run's data (`utils/manifest.py`)
    parallel: Any = None  # the model to call in training, wrapped or compiled; not saved
    split_values: Tensor | None = None  # (N,) what decided the last split; not saved
    stepper: Stepper | None = None  # runs the training steps; not saved

    def __post_init__(self) -> None:
        self.parallel = self.parallel or self.model

    def tensors(self) -> dict[str, list[Tensor]]:
        """Return all tensors that training changes in place, by kind: weights, BN statistics, the optimizer's moments."""
        return changed_tensors(self.model, self.optimizer)

    def keep_split(self, clean_pool: Tensor, values: Tensor | None) -> None:
        """Keep the split of an epoch: the clean pool (P,) int64 and the values (N,), if any, that decided; on the CPU."""
        self.clean_pool, self.split_values = clean_pool, values
        self.epochs_in_clean_pool[clean_pool] += 1


def contents(state: State, config: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of the checkpoint of a finished epoch. Its tensors are those of the state, not copies."""
    saved = {
        "epoch": state.epoch - 1,  # as in the authors' checkpoints: the finished epoch, 0-based
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
    if state.networks:
        saved["networks"] = {name: network.state_dict() for name, network in state.networks.items()}
    saved |= {name: getattr(state, name) for name in ("sets", "tables") if getattr(state, name)}
    return saved


def last_epoch(saved: dict[str, Any], num_epochs: int) -> int:
    """Return the 0-based number of a checkpoint's last epoch, as far as a run of `num_epochs` has it; 0 if it is unknown."""
    epoch = saved.get("epoch")
    return min(max(epoch, 0), num_epochs - 1) if isinstance(epoch, int) else 0


def write(path: Path, saved: dict[str, Any], also: Sequence[Path] = ()) -> None:
    """Write the contents of a checkpoint atomically; `also`: further names of the file (`write_atomically`)."""
    buffer = io.BytesIO()  # torch writes to memory: a full disk is then an ordinary OSError
    torch.save(saved, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()), also)


class Writer:
    """Writes checkpoints in a background thread, one at a time. Leaving the `with` block waits for the last one.

    An error of the thread is raised by the next call, or on leaving the block.
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
        """Copy the state of a finished epoch to the host, then start writing it in the background.

        Args:
            also: further names of the checkpoint, which exist before `path` does.
            then: called by the thread once all names exist.
        Raises:
            UserError: the previous checkpoint could not be written.
        """
        self.wait()
        saved = copy_to_host(contents(state, config))

        def work() -> None:
            write(path, saved, also)
            then()

        self.pending = self.pool.submit(work)

    def wait(self) -> None:
        """Wait for the current write; raise its error, once."""
        if self.pending is not None:
            wait([self.pending])  # interrupted by Ctrl-C, it stays pending
            done, self.pending = self.pending, None
            done.result()


def copy_to_host(tree: Any) -> Any:
    """Return a copy of nested containers with every tensor copied to host memory; other values are shared."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        out = copy.copy(tree)  # keeps the type, and the version metadata of torch's state dicts
        for key, value in tree.items():
            out[key] = copy_to_host(value)
        return out
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(copy_to_host, tree))
    return tree


def read(path: Path) -> dict[str, Any]:
    """Read the contents of a checkpoint on the CPU, with the weights' names in the plain network (`plain_name`).

    Raises:
        UserError: the file is missing, unreadable, truncated, not a checkpoint, or needs more than tensors and plain values.
    """
    exists = is_file(path, "--resume")
    others = ", ".join(sorted(p.name for p in path.parent.glob("*.pt") if p != path))
    if not exists:
        raise UserError(f"--resume {path}: no such checkpoint: the folder has {others or 'none: train first with ASD.py'}")
    remedy = f"use another one: {others}" if others else "train again with ASD.py --resume False"
    broken = UserError(f"{path}: truncated, or not a checkpoint: {remedy}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_SCALARS):  # the authors have numpy scalars
            warnings.simplefilter("ignore")  # torch's warnings about old pickles
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:  # torch does not compare the checksums: the weights would be wrong
                        raise broken
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if "GLOBAL " in reason or "call reduce" in reason:
            raise UserError(f"{path}: contains code that no checkpoint needs: it may be malicious; do not use it") from None
        raise broken from None
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): make it readable") from None
    except (
        RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError,
        OverflowError, MemoryError, AssertionError, ImportError, struct.error, zlib.error, lzma.LZMAError,
    ):  # fmt: skip
        raise broken from None
    weights = loaded.get("model_state_dict") if isinstance(loaded, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(t, Tensor) for t in weights.values()):
        raise UserError(f"{path}: no model_state_dict: not a checkpoint of ASD.py")
    if "epoch" in loaded:
        loaded["epoch"] = whole_number(loaded["epoch"])
    loaded["model_state_dict"] = {plain_name(str(key)): tensor for key, tensor in weights.items()}
    return dict(loaded)


def whole_number(value: Any) -> int | None:
    """Return a number, numpy scalar or tensor as an int; None if it is not whole, or none at all."""
    try:
        return int(value) if int(value) == value else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def plain_name(key: str) -> str:
    """Return the name of a weight without the parts that wrappers add: a leading `module.` (DDP), any `_orig_mod` (compile)."""
    parts = [part for part in key.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def epochs(path: Path) -> int:
    """Return the number of epochs of a checkpoint; 0 if there is none, or it cannot be read."""
    try:
        return int(read(path)["epoch"]) + 1
    except (UserError, KeyError, ValueError, TypeError):
        return 0


def about(saved: dict[str, Any]) -> tuple[tuple[str, ...], tuple[int, int] | None]:
    """Return the class names in a checkpoint, and the height and width of its training images; old checkpoints lack both."""
    facts = saved.get("about")
    facts = facts if isinstance(facts, dict) else {}
    names, size = facts.get("class_names"), facts.get("image_size")
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    sized = isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and 0 < side <= 4096 for side in size)
    return tuple(names or ()) if known else (), (size[0], size[1]) if sized and size else None


def data_of(saved: dict[str, Any] | None) -> str:
    """Return the manifest in a checkpoint; empty if it has none, being of the authors or an earlier version, or is None."""
    data = (saved or {}).get("data")
    return data if isinstance(data, str) else ""


def load_weights(model: nn.Module, saved: dict[str, Any], path: Path) -> None:
    """Load the weights of a checkpoint into the model; raise `UserError` if they are those of another network."""
    own, given = model.state_dict(), saved["model_state_dict"]
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        key = f"lacks {missing[0]}" if missing else f"has {extra[0]}"
        raise UserError(f"{path}: is a checkpoint of another network ({key}): give the YAML that it was trained with")
    for name, tensor in given.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{path}: is a checkpoint of another network ({name} is {tuple(tensor.shape)}, the YAML's network has "
                f"{tuple(own[name].shape)}): give the YAML that it was trained with"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} has values that are not finite: use an earlier checkpoint")
    model.load_state_dict(given)


def load(path: Path, state: State, config: dict[str, Any], saved: dict[str, Any] | None = None) -> None:
    """Load a checkpoint into a state, to resume training.

    Args:
        state: of a run before its first epoch, with the manifest of its data.
        saved: contents of the file; None: read it, and compare its settings with `config`.
    Raises:
        UserError: as `read`; or the checkpoint is of other settings or other data.
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
        if not isinstance(saved.get("config"), dict):
            refuse_other_optimizer(path, state.optimizer, saved["optimizer_state_dict"])
        load_optimizer(state.optimizer, saved["optimizer_state_dict"])
        if state.scheduler is not None:
            state.scheduler.load_state_dict(saved["scheduler_state_dict"])
        state.history = [dict(row) for row in saved.get("history", [])]
        state.clean_pool = saved.get("clean_pool", state.clean_pool)
        state.epochs_in_clean_pool = saved.get("epochs_in_clean_pool", state.epochs_in_clean_pool)
        if dropped := saved.get("networks", {}).keys() - state.networks.keys():
            raise ValueError(f"the defense's `build` adds no network {min(dropped)} in this stage")
        for name, network in state.networks.items():
            network.load_state_dict(saved["networks"][name])
        state.sets, state.tables = dict(saved.get("sets", {})), dict(saved.get("tables", {}))
        check_state(state, count)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path}: its training state does not fit this run ({type(error).__name__}: {error}): use another checkpoint, or "
            "--resume False to start over"
        ) from None


def refuse_other_optimizer(path: Path, optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Refuse the optimizer of a checkpoint without settings if it has other options than the configured one."""
    for group, given in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        base = "initial_lr" if "initial_lr" in group and "initial_lr" in given else "lr"  # without and with a schedule
        for key in (base, "betas", "momentum", "weight_decay", "nesterov"):
            then, now = plain(given.get(key)), plain(group.get(key))
            if then != now:
                raise UserError(
                    f"{path}: was written by an optimizer with {key} {then}, but the configuration gives {now}: set the "
                    "section optimizer to what it was trained with, or start a new run: --resume False"
                )


def plain(value: Any) -> Any:
    """Return an option of an optimizer in a form that can be compared; a learning rate may have been stored as float32."""
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value))
    if isinstance(value, (float, Tensor)):
        return float(f"{float(value):.6g}")
    return value


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load the state of an optimizer; the options of this run (CUDA graph, fused kernels, memory format) are kept."""
    for group, given in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        given.update({key: group[key] for key in ("capturable", "fused", "foreach") if key in group})
        rate = float(given["lr"])
        given["lr"] = torch.tensor(rate, device=group["lr"].device) if isinstance(group["lr"], Tensor) else rate
    optimizer.load_state_dict(saved)
    for parameter, moments in optimizer.state.items():  # fused kernels need the strides of the weights
        for name, moment in moments.items():
            if isinstance(moment, Tensor) and moment.shape == parameter.shape and moment.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=moment.dtype, requires_grad=False).copy_(moment)


def check_kept(state: State, count: int, built: Collection[str], source: str) -> None:
    """Raise `UserError` if a defense left something in the state with which the checkpoint could not be read again.

    Args:
        count: of training images.
        built: names of the networks that there are when a checkpoint is loaded.
        source: file of the defense.
    """
    for name, indices in {"clean_pool": state.clean_pool, **{f"sets[{key!r}]": x for key, x in state.sets.items()}}.items():
        if not are_indices(indices, count):
            kind = kind_of(indices)
            raise UserError(f"{source}: state.{name}: must be int64 indices (n,) of the {count} training images, is {kind}")
    for key in state.networks:
        if key not in built:
            raise UserError(f"{source}: state.networks[{key!r}]: must be added in `build`, which a resumed run calls as well")
    for key, table in state.tables.items():
        if not isinstance(table, Tensor):
            raise UserError(f"{source}: state.tables[{key!r}]: must be a tensor, is {type(table).__name__}")


def are_indices(value: object, count: int) -> bool:
    """Return whether a value is a list of indices of `count` images: (n,) int64."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64 or value.ndim != 1:
        return False
    return not bool(((value < 0) | (value >= count)).any())


def check_state(state: State, count: int) -> None:
    """Raise ValueError if a loaded state does not fit a run on `count` training images."""
    rows = [row["epoch"] for row in state.history]  # without the epochs of an authors' checkpoint
    if state.epoch < 1 or rows != list(range(state.epoch - len(rows), state.epoch)) or len(rows) > state.epoch:
        raise ValueError(f"epoch {state.epoch - 1} with a history of the epochs {rows[:1]} to {rows[-1:]}")
    epochs = state.epochs_in_clean_pool
    for name, indices in {"clean_pool": state.clean_pool, **state.sets}.items():
        if not are_indices(indices, count):
            raise ValueError(f"{name}: not indices of the training set")
    if epochs.dtype != torch.int32 or epochs.shape != (count,):
        raise ValueError(f"epochs_in_clean_pool is {epochs.dtype} {tuple(epochs.shape)} for {count} images")
    for parameter, moments in state.optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(f"the optimizer's {name} is {tuple(value.shape)} for weights {tuple(parameter.shape)}")
