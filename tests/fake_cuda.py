"""A simulated CUDA device for a computer without one. Programs run on it, and it enforces what a real device enforces.

    with pretended_cuda() as device:
        ...                      # torch.cuda.is_available() is true, tensors on cuda:0 can be made and used
    assert not device.reads      # places where the host waited for the device

How it works: `CudaTensor` is a tensor that Python sees on cuda:0 while C++ sees torch's meta device, so autograd needs no
driver. (torch's own FakeTensor on cuda has a forward pass without a driver, but no backward pass.) Below autograd every
operator arrives at `Device.run`, which computes it on a CPU tensor inside.

What it notices: operators over tensors of two devices; reads by the host and uploads from host memory, counted, and refused
during a capture; fused optimizers over tensors of different memory layouts; Python numbers that a graph freezes (`Graph`).
What it cannot show: kernels, the order of streams, NCCL, cuDNN's choice of algorithms, memory, time.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # imports what it needs before anything is patched
import torchvision  # noqa: F401 - this too
from conftest import REPOSITORY
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)

READS = {  # operators whose result the host must have before it can go on
    aten._local_scalar_dense.default, aten.equal.default, aten.allclose.default, aten.nonzero.default, aten.bincount.default,
    aten.masked_select.default, aten._unique2.default, aten.unique_dim.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Operators that update running statistics without declaring it in their schema: the positions of these arguments.
HIDDEN_WRITES = {aten.native_batch_norm.default: (3, 4), aten.cudnn_batch_norm.default: (3, 4)}


class CudaTensor(torch.Tensor):
    """A tensor on the simulated device; its values are those of `inner`, a CPU tensor."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> CudaTensor:
        shell = torch.empty_strided(inner.size(), inner.stride(), dtype=inner.dtype, device="meta")
        made: CudaTensor = torch.Tensor._make_subclass(cls, shell, False, device_for_backend_keys=CUDA)  # type: ignore[call-arg]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert Device.now is not None, "a tensor of the simulated device is used after the block"
        return Device.now.run(func, args, kwargs or {})

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As on CUDA, moving a tensor to the device that it is on returns the tensor itself."""
        if len(args) == 1 and not kwargs and isinstance(args[0], (torch.device, str)) and torch.device(args[0]).type == "cuda":
            return self
        return super().to(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"


class Device(TorchDispatchMode):
    """The simulated device: runs operators, and counts what would make a real one wait."""

    now: Device | None = None

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()  # by line of the project and operator: the host waits for the device
        self.uploads: Counter[str] = Counter()  # from pageable memory: the host waits too
        self.launches: Counter[str] = Counter()  # by operator: those that start kernels
        self.channels_last: Counter[bool] = Counter()  # the memory formats of the inputs and weights of convolutions
        self.graphs: list[Graph] = []  # all that were captured, in order
        self.capturing: Graph | None = None
        self.stream = Stream.default

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        # A number that C++ makes in a backward pass, e.g. of a clamp, is on its own idea of the device.
        there = device is not None and (device.type == "cuda" or (func is aten.scalar_tensor.default and device.type == "meta"))
        if there or any(isinstance(t, CudaTensor) for t in tensors_in(args, kwargs)):
            return self.run(func, args, kwargs)
        return func(*args, **kwargs)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator on the device, or add it to the graph that is being captured."""
        tensors = tensors_in(args, kwargs)
        there = [t for t in tensors if isinstance(t, CudaTensor)]
        here = [t for t in tensors if not isinstance(t, CudaTensor)]
        target = kwargs.get("device")
        if func is aten._to_copy.default and there and target is not None and target.type == "cpu":
            self.read(func)
            return func(args[0].inner, **kwargs)
        if func is aten.copy_.default and not isinstance(args[0], CudaTensor):
            self.read(func)
            return args[0].copy_(args[1].inner)
        if func in READS or (func in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1]))):
            self.read(func)
        if here and (func in (aten._to_copy.default, aten.copy_.default) or (there and func in INDEXING)):
            self.upload(func)  # torch moves an index from host memory by itself, every time
        elif here and there:
            self.mix(func, here)
        out = self.call(func, args, kwargs)
        if func is aten._local_scalar_dense.default or not isinstance(out, (Tensor, list, tuple)):
            return out
        known = {id(t.inner): t for t in there}
        return replaced(out, lambda t: known[id(t)] if id(t) in known else CudaTensor(t))

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run or record an operator on the inner tensors."""
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        args, kwargs = (replaced(part, lambda t: t.inner if isinstance(t, CudaTensor) else t) for part in (args, kwargs))
        if func is aten.convolution.default:
            self.channels_last.update(t.is_contiguous(memory_format=torch.channels_last) for t in args[:2] if t.dim() == 4)
        if func.name().startswith("aten::_fused_"):
            check_fused_layouts(func, args)
        out = self.capturing.record(func, args, kwargs) if self.capturing else func(*args, **kwargs)
        made = tensors_in(out)
        if writes_arguments(func) or not made or not all(shares_memory(t, args) for t in made):  # else it makes a view
            self.launches[func.name()] += 1
        return out

    def read(self, func: Any) -> None:
        self.reads[f"{place()} {func.name()}"] += 1
        self.refuse_in_capture(f"the host reads from the device ({func.name()})")

    def upload(self, func: Any) -> None:
        self.uploads[f"{place()} {func.name()}"] += 1
        self.refuse_in_capture(f"the host sends pageable memory to the device ({func.name()})")

    def mix(self, func: Any, here: list[Tensor]) -> None:
        """Refuse CPU tensors beside the device's own; as on CUDA one number is allowed, but a graph would freeze it."""
        if any(t.dim() for t in here) or torch.Tag.pointwise not in func.tags:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({func.name()})")
        self.refuse_in_capture(f"a number in the host's memory becomes a constant of the graph ({func.name()})")

    def refuse_in_capture(self, what: str) -> None:
        if self.capturing is not None:
            self.capturing.broken = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")


@dataclass
class Operation:
    """A recorded operator with its arguments, and the tensors that its results are written to."""

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    results: list[Tensor]
    name: str

    def run(self) -> None:
        for result, t in zip(self.results, tensors_in(self.func(*self.args, **self.kwargs)), strict=False):
            result.copy_(t)


class Graph:
    """`torch.cuda.CUDAGraph`. A capture computes nothing; a replay does the recorded work in the recorded memory, with the
    host's numbers as they were at the capture."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []  # a test may change them
        self.replays = 0
        self.broken = False

    def capture_begin(self, *_: Any, **__: Any) -> None:
        device = running_device()
        assert device.capturing is None and device.stream is not Stream.default, "a capture needs a stream of its own"
        device.capturing = self

    def capture_end(self) -> None:
        device = running_device()
        device.capturing = None
        if self.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        device.graphs.append(self)

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Add an operator; return views as they are, everything else without values: the memory for a replay's results."""
        operation = Operation(func, args, kwargs, [], func.name())
        if writes_arguments(func):
            self.operations.append(operation)
            given = dict(zip((spec.name for spec in func._schema.arguments), args, strict=False)) | kwargs
            written = [given[spec.name] for spec in func._schema.arguments if is_written(spec)]
            assert not func._schema.returns or len(written) == len(func._schema.returns) == 1, func
            return written[0] if func._schema.returns else None
        hidden = HIDDEN_WRITES.get(func, ())
        out = func(*(a.clone() if i in hidden and a is not None else a for i, a in enumerate(args)), **kwargs)
        operation.results = tensors_in(out)
        if any(shares_memory(t, args) for t in operation.results):
            return out  # a view: of the same memory at every replay
        for t in operation.results:
            t.fill_(float("nan") if t.is_floating_point() else 0)
        self.operations.append(operation)
        return out

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        with _disable_current_modes():  # the arguments are CPU tensors
            for operation in self.operations:
                operation.run()


class Stream:
    """`torch.cuda.Stream` and `torch.cuda.Event`: here everything happens in order."""

    default: Stream
    device = CUDA
    cuda_stream = 0
    began = 0.0

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def is_capturing(self) -> bool:
        return running_device().capturing is not None

    def elapsed_time(self, other: Stream) -> float:
        return max(1000 * (other.began - self.began), 1e-6)


Stream.default = Stream()


class CudaFunctions(TorchFunctionMode):
    """What C++ decides by the device, which to it is the meta device: autocast, and a few functions more."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(type(value) is torch.device for value in (*args, *kwargs.values())):
            args, kwargs = tuple(numbered(a) for a in args), {k: numbered(v) for k, v in kwargs.items()}
        if args and isinstance(args[0], CudaTensor):
            if func in (torch.conv2d, torch._C._nn.linear) and torch.is_autocast_enabled("cuda"):
                args, kwargs = replaced(args, narrowed), replaced(kwargs, narrowed)
            elif func is nn.functional.one_hot:  # CUDA checks no values: the host reads nothing
                return torch.zeros(*args[0].shape, args[1], dtype=torch.int64, device=CUDA).scatter_(-1, args[0][..., None], 1)
            elif func is Tensor.__setitem__ and isinstance(args[2], (int, float)):
                return args[0][args[1]].fill_(args[2])
        return func(*args, **kwargs)


def numbered(value: Any) -> Any:
    """Return cuda:0 for cuda: C++ would ask the driver for the current device."""
    return CUDA if type(value) is torch.device and value.type == "cuda" else value


def narrowed(t: Tensor) -> Tensor:
    """Return a float32 tensor in the precision of autocast."""
    return t.to(torch.get_autocast_dtype("cuda")) if t.dtype == torch.float32 else t


def tensors_in(*parts: Any) -> list[Tensor]:
    """Return the tensors in an operator's arguments or results (torch's pytree is slower by far)."""
    out: list[Tensor] = []
    for part in parts:
        if isinstance(part, Tensor):
            out.append(part)
        elif isinstance(part, (list, tuple)):
            out += tensors_in(*part)
        elif isinstance(part, dict):
            out += tensors_in(*part.values())
    return out


def replaced(part: Any, new: Callable[[Tensor], Tensor]) -> Any:
    """Return an operator's arguments or results with every tensor replaced."""
    if isinstance(part, Tensor):
        return new(part)
    if isinstance(part, (list, tuple)):
        return type(part)(replaced(p, new) for p in part)
    return {k: replaced(v, new) for k, v in part.items()} if isinstance(part, dict) else part


def is_written(spec: Any) -> bool:
    """Return whether an operator writes to an argument of its schema."""
    return spec.alias_info is not None and bool(spec.alias_info.is_write)


@functools.cache
def writes_arguments(func: Any) -> bool:
    """Return whether an operator's schema names an argument that it writes to."""
    return any(is_written(spec) for spec in func._schema.arguments)


def shares_memory(t: Tensor, args: Any) -> bool:
    """Return whether a tensor shares its memory with one of the arguments."""
    mine = t.untyped_storage()._cdata
    return any(a.untyped_storage()._cdata == mine for a in tensors_in(args))


def check_fused_layouts(func: Any, args: Any) -> None:
    """As CUDA's fused optimizers, refuse weights, gradients and moments that differ in their memory layout."""
    lists = [part for part in args[: 3 if "sgd" in func.name() else 4] if part]
    for first, *others in zip(*lists, strict=True):
        for t in others:
            strides = zip(first.shape, first.stride(), t.stride(), strict=True)
            if t.shape != first.shape or any(n != 1 and a != b for n, a, b in strides):
                raise RuntimeError("params, grads, exp_avgs, and exp_avg_sqs must have same dtype, device, and layout")


def place() -> str:
    """Return the innermost line of the project, apart from its tests, that is running."""
    frame: Any = sys._getframe()
    while frame is not None:
        path, _, rest = frame.f_code.co_filename.partition(f"{REPOSITORY}/")
        if not path and not rest.startswith(("tests/", ".")) and "site-packages" not in rest:
            return f"{rest}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "tests"


def running_device() -> Device:
    assert Device.now is not None
    return Device.now


@contextlib.contextmanager
def pretended_cuda() -> Iterator[Device]:
    """Give this computer one CUDA device (of Hopper's capability, with 80 GB) for the length of the block."""
    device = Device()
    group, generator = torch.optim.Optimizer._group_tensors_by_device_and_dtype, torch.Generator

    def grouped(lists: Any, with_indices: bool = False) -> Any:  # C++ sees the meta device
        return {(CUDA if d and d.type == "meta" else d, t): v for (d, t), v in group(lists, with_indices).items()}

    of_cuda = {
        "is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda *_: None, "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0), "get_device_name": lambda *_: "simulated", "_lazy_init": lambda: None,
        "mem_get_info": lambda *_: (80 * 10**9, 80 * 10**9), "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: None, "empty_cache": lambda: None, "manual_seed_all": lambda _: None,
        "Stream": Stream, "Event": Stream, "current_stream": lambda *_: device.stream,
        "set_stream": lambda stream: setattr(device, "stream", stream),
        "CUDAGraph": Graph, "is_current_stream_capturing": lambda: device.capturing is not None,
        "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0, "reset_peak_memory_stats": lambda *_: None,
    }  # fmt: skip
    patches = [
        *((torch.cuda, name, fact) for name, fact in of_cuda.items()),
        (torch.cuda.graph, "default_capture_stream", None),
        (torch.accelerator, "current_stream", lambda *_: device.stream),
        (torch.optim.Optimizer, "_group_tensors_by_device_and_dtype", staticmethod(grouped)),
        (sys.modules["torch.optim.optimizer"], "_foreach_supported_types", [Tensor, nn.Parameter, CudaTensor]),
        (torch, "Generator", type("Generator", (), {"__new__": lambda cls, device=None: generator()})),
        (Device, "now", device),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.object(torch._C, "_host_emptyCache", lambda: None, create=True))
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        clear_caches()
        stack.callback(clear_caches)  # no tensor of the device may stay behind
        stack.enter_context(CudaFunctions())
        stack.enter_context(device)
        yield device


def clear_caches() -> None:
    """Empty the project's function caches: some hold tensors by their device."""
    cached = type(functools.cache(lambda: None))
    for module in list(sys.modules.values()):
        file = Path(getattr(module, "__file__", None) or "/")
        if file.is_relative_to(REPOSITORY) and "site-packages" not in file.parts:  # the environment may lie inside
            for value in list(vars(module).values()):
                if isinstance(value, cached) and value.__module__ == module.__name__:
                    value.cache_clear()
