"""A pretended CUDA device for a computer without one: the programs run on it, and it minds what a real one would mind.

    with pretended_cuda() as device:
        ...                      # torch.cuda.is_available() is true, and tensors on cuda:0 can be made and used
    assert not device.reads      # where the host waited for the device

How it works. `CudaTensor` is a tensor that Python sees on cuda:0, while C++ takes it for one on torch's meta device: so
autograd works without a driver. (torch's own FakeTensor on cuda has a forward pass, but no backward pass without one.) Below
autograd every operator comes to `Device.run`, which computes on ordinary CPU tensors inside, or only follows shapes, types
and layouts by torch's FakeTensor rules, so that a step of full size takes seconds.

What it notices: tensors of two devices in one operator; reads by the host and uploads from its memory, counted, and refused
while a graph is captured; fused optimizers over tensors of different layout; what a graph freezes (`Graph`).

What it cannot show: kernels, streams, NCCL, cuDNN's choice of algorithms, memory, time.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # imports what it needs before anything is patched
import torchvision  # noqa: F401 - this too
from conftest import REPOSITORY
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)

READS = {  # operators whose result the host must have before it can go on
    aten._local_scalar_dense.default, aten.equal.default, aten.allclose.default, aten.nonzero.default, aten.bincount.default,
    aten.masked_select.default, aten._unique2.default, aten.unique_dim.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
PRODUCTS = {"aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm", "aten::bmm"}
# Operators that move running statistics without saying so in their schema: the places of these arguments.
HIDDEN_WRITES = {aten.native_batch_norm.default: (3, 4), aten.cudnn_batch_norm.default: (3, 4)}


class CudaTensor(torch.Tensor):
    """A tensor on the pretended device; its values are those of `inner`, a CPU tensor or (without values) a FakeTensor."""

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
        assert Device.now is not None, "a tensor of the pretended device is used after the device was closed"
        return Device.now.run(func, args, kwargs or {})

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As on CUDA, moving a tensor to where it is gives the tensor itself."""
        if len(args) == 1 and not kwargs and isinstance(args[0], (torch.device, str)) and torch.device(args[0]).type == "cuda":
            return self
        return super().to(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Torch's own would copy the inner tensor twice."""
        if id(self) not in memo:
            copied = CudaTensor(self.inner.clone())
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return memo[id(self)]  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"


class Device(TorchDispatchMode):
    """The pretended device: runs operators, and records what would make a real one slow or fail.

    Args:
        compute: compute numbers; else only follow shapes, types and layouts, and let every read give 1.
    """

    now: Device | None = None

    def __init__(self, compute: bool) -> None:
        super().__init__()
        self.fake = None if compute else FakeTensorMode(allow_non_fake_inputs=True)
        self.reads: Counter[str] = Counter()  # by place: how often the host waits for the device
        self.uploads: Counter[str] = Counter()  # from pageable memory: the host waits too
        self.launches: Counter[str] = Counter()  # operators that start kernels
        self.layouts: Counter[bool] = Counter()  # of the inputs and weights of convolutions: are the channels last?
        self.graphs: list[Graph] = []  # in the order of their captures
        self.capturing: Graph | None = None
        self.stream: Any = Stream()
        # What a test may change:
        self.can_capture = True
        self.on_captured: Callable[[Graph], object] = lambda graph: None
        self.on_replay: Callable[[Graph], object] = lambda graph: None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._pin_memory.default:
            return args[0]
        device = kwargs.get("device")
        if (device is not None and device.type == "cuda") or any(isinstance(t, CudaTensor) for t in tensors_in(args, kwargs)):
            return self.run(func, args, kwargs)
        return func(*args, **kwargs)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator on the device, or put it into the graph that is being captured."""
        tensors = tensors_in(args, kwargs)
        there = [t for t in tensors if isinstance(t, CudaTensor)]
        here = [t for t in tensors if not isinstance(t, CudaTensor)]
        target = kwargs.get("device")
        if func is aten._to_copy.default and there and target is not None and target.type == "cpu":
            self.read(func)
            return self.download(self.call(func, args, kwargs | {"device": None}))
        if func is aten.copy_.default and not isinstance(args[0], CudaTensor):
            self.read(func)
            return args[0].copy_(self.download(args[1].inner))
        if func in READS or (func in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in tensors_in(args[1]))):
            self.read(func)
            if self.fake is not None and func is aten._local_scalar_dense.default:
                return torch.ones((), dtype=args[0].dtype).item()
            if self.fake is not None and func in (aten.equal.default, aten.allclose.default):
                return True
        if here and (func in (aten._to_copy.default, aten.copy_.default) or (there and func in INDEXING)):
            self.upload(func)  # an index in the host's memory too: torch moves it by itself, every time
        elif here and there:
            self.mix(func, here)
        out = self.call(func, args, kwargs)
        if func is aten._local_scalar_dense.default or not isinstance(out, (Tensor, list, tuple)):
            return out
        known = {id(t.inner): t for t in there}
        return replaced(out, lambda t: known[id(t)] if id(t) in known else CudaTensor(t))

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operator on the inner tensors."""
        if kwargs.get("device") is not None:
            kwargs = kwargs | {"device": CUDA if self.fake else torch.device("cpu")}
        args, kwargs = (replaced(part, lambda t: t.inner if isinstance(t, CudaTensor) else t) for part in (args, kwargs))
        if func is aten.convolution.default:
            self.layouts.update(t.is_contiguous(memory_format=torch.channels_last) for t in args[:2] if t.dim() == 4)
        fused = func.name().startswith("aten::_fused_")
        if fused:
            check_fused_layouts(func, args)
        if self.fake is not None:
            with self.fake:  # FakeTensor has no rule for fused optimizers; they return nothing
                out = None if fused else func(*args, **kwargs)
        else:
            out = self.capturing.record(func, args, kwargs) if self.capturing else func(*args, **kwargs)
        made = tensors_in(out)
        if writes_arguments(func) or not made or not all(shares_memory(t, args) for t in made):  # else a view
            self.launches[func.name()] += 1
        return out

    def download(self, inner: Tensor) -> Tensor:
        return inner.detach().clone() if self.fake is None else torch.zeros(inner.shape, dtype=inner.dtype)

    def read(self, func: Any) -> None:
        self.reads[f"{place()} {func.name()}"] += 1
        self.refuse_in_capture(f"the host reads from the device ({func.name()})")

    def upload(self, func: Any) -> None:
        self.uploads[f"{place()} {func.name()}"] += 1
        self.refuse_in_capture(f"the host sends pageable memory to the device ({func.name()})")

    def mix(self, func: Any, here: list[Tensor]) -> None:
        """Refuse CPU tensors beside the device's; a single number is allowed, but a graph would freeze it."""
        if any(t.dim() for t in here) or torch.Tag.pointwise not in func.tags:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({func.name()})")
        self.refuse_in_capture(f"a number in the host's memory becomes a constant of the graph ({func.name()})")

    def refuse_in_capture(self, what: str) -> None:
        if self.capturing is not None:
            self.capturing.broken = True
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")


@dataclass
class Operation:
    """An operator of a graph with its arguments, and the tensors that its results are written to."""

    func: Any
    args: Any
    kwargs: Any
    results: list[Tensor]

    @property
    def name(self) -> str:
        return str(self.func.name())

    def run(self, noise: float) -> None:
        out = self.func(*self.args, **self.kwargs)
        for result, t in zip(self.results, tensors_in(out), strict=False):
            result.copy_(t)
            if noise and self.name in PRODUCTS:
                result.mul_(1 + noise * (2 * torch.rand_like(result) - 1))


class Graph:
    """`torch.cuda.CUDAGraph`: while it is captured nothing is computed; a replay does the recorded work in the recorded
    memory, with the host's numbers as they were at the capture."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.replays = 0
        self.noise = 0.0  # relative, on the results of products: as by kernels that add in another order, or in bf16
        self.broken = False

    def capture_begin(self, *_: Any, **__: Any) -> None:
        device = running_device()
        assert device.capturing is None and device.stream is not Stream.default, "a capture needs a stream of its own"
        if not device.can_capture:
            raise RuntimeError("CUDA error: this device captures no graphs")
        device.capturing = self

    def capture_end(self) -> None:
        device = running_device()
        device.capturing = None
        if self.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        device.graphs.append(self)
        device.on_captured(self)

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Note an operator; return its result without values, or the memory that it will write to."""
        if writes_arguments(func):
            self.operations.append(Operation(func, args, kwargs, []))
            written = [t for spec, t in zip(func._schema.arguments, args, strict=False) if is_written(spec)]
            return written[0] if len(written) == 1 and func._schema.returns else None
        hidden = HIDDEN_WRITES.get(func, ())
        out = func(*(a.clone() if i in hidden and a is not None else a for i, a in enumerate(args)), **kwargs)
        made = tensors_in(out)
        if any(shares_memory(t, args) for t in made):
            return out  # a view: the same memory at every replay
        for t in made:
            t.fill_(float("nan") if t.is_floating_point() else 0)
        self.operations.append(Operation(func, args, kwargs, made))
        return out

    def replay(self) -> None:
        device = running_device()
        device.on_replay(self)
        self.replays += 1
        with torch.no_grad():
            for operation in self.operations:
                operation.run(self.noise)


class Stream:
    """`torch.cuda.Stream` and `torch.cuda.Event`: everything happens in order here."""

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
    """What C++ decides by the device, where it would see the meta device: autocast, and a few functions more."""

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
    """Return cuda:0 for cuda: C++ would ask the driver which device is meant."""
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
    """Return the innermost line of the project, tests aside, that is being run."""
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
def pretended_cuda(compute: bool = True) -> Iterator[Device]:
    """Let this computer have one CUDA device (of Hopper's kind, 80 GB) for the length of the block."""
    device = Device(compute)
    group, save, generator = torch.optim.Optimizer._group_tensors_by_device_and_dtype, torch.save, torch.Generator

    def grouped(lists: Any, with_indices: bool = False) -> Any:  # C++ sees the meta device
        return {(CUDA if d and d.type == "meta" else d, t): v for (d, t), v in group(lists, with_indices).items()}

    def saved(thing: Any, *args: Any, **kwargs: Any) -> None:
        save(tree_map(lambda t: t.detach().cpu() if isinstance(t, CudaTensor) else t, thing), *args, **kwargs)

    def set_stream(stream: Any) -> None:
        device.stream = stream

    device.stream = Stream.default
    of_cuda = {
        "is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda *_: None, "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0), "get_device_name": lambda *_: "pretended", "_lazy_init": lambda: None,
        "mem_get_info": lambda *_: (80 * 10**9, 80 * 10**9), "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: None, "empty_cache": lambda: None, "manual_seed_all": lambda _: None,
        "Stream": Stream, "Event": Stream, "current_stream": lambda *_: device.stream, "set_stream": set_stream,
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
        (torch, "save", saved),
        (torch, "Generator", type("Generator", (), {"__new__": lambda cls, device=None: generator()})),
        (FakeTensorMode, "avoid_device_init", property(lambda _: True)),
        (fake_tensor, "init_gpu_context", lambda _: None),
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
        stack.callback(clear_caches)  # before the device is closed: no tensor of it may stay behind
        clear_caches()
        stack.enter_context(mock.patch.object(Device, "now", device))
        stack.enter_context(CudaFunctions())
        stack.enter_context(device)
        yield device


def clear_caches() -> None:
    """Empty the project's function caches, in which tensors are kept by their device."""
    for module in list(sys.modules.values()):
        if str(getattr(module, "__file__", None) or "").startswith(f"{REPOSITORY}/"):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear") and getattr(value, "__module__", None) == module.__name__:
                    value.cache_clear()
