"""A GPU that is not there: the CPU computes, but tensors keep to the device that the code put them on.

Example::

    with PretendGPU() as gpu:
        model.to("cuda")
        model(batch)  # raises where a tensor was made on the CPU that belongs on the GPU
    gpu.waits  # where the host would have waited for the GPU

As on CUDA, these raise: an operation on tensors of both devices, but for numbers (no dimensions) and indices on the
CPU; NumPy arrays of tensors on the GPU; draws from a generator of the other device. ``torch.autocast("cuda")`` is that
of the CPU, with CUDA's list of what stays in float32; ``torch.autocast("cpu")`` does nothing to tensors on the GPU.

It cannot see what differs between the kernels of CPU and CUDA: supported dtypes, atomics, memory, streams and
asynchronous copies. Nor what PyTorch does in C++: what autocast casts inside one of its functions, and whether autograd
and DistributedDataParallel keep to a device. A number on the CPU passes nearly everywhere, though some operations of
CUDA want it on the GPU. Wrapped tensors have no memory of their own for anything to look at.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._device import _device_constructors
from torch.utils._mode_utils import no_dispatch

DEVICE = torch.device("cuda:0")
aten = torch.ops.aten

#: Operations between the devices.
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {
    *(aten.index.Tensor, aten._unsafe_index.Tensor),
    *(aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default),
}
#: What PyTorch makes of ``x[indices] = number`` on the CPU.
INDEX_FILLS = {aten.index_fill_.int_Scalar, aten.index_fill_.int_Tensor}
#: Operations for which even numbers have to be on the GPU.
STRICT = {aten.stack.default, aten.index_select.default, aten.gather.default, aten.scatter.src}
#: Operations whose results' sizes, or whose results, the host has to know: it waits for the GPU.
WAITING = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default),
    *(aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default),
}


#: Functions and methods that autocast computes in float32 on CUDA, but not on the CPU.
FLOAT32 = set(
    "__pow__ __rpow__ __rtruediv__ acos asin cosh sinh tan exp expm1 log log10 log2 log1p pow reciprocal rsqrt "
    "softmax log_softmax softmin softplus sum cumsum cumprod prod norm normalize renorm layer_norm group_norm "
    "cosine_similarity cross_entropy nll_loss kl_div l1_loss mse_loss smooth_l1_loss binary_cross_entropy_with_logits "
    "cosine_embedding_loss hinge_embedding_loss margin_ranking_loss soft_margin_loss triplet_margin_loss".split()
)


class GPUTensor(Tensor):
    """A tensor on the GPU that is not there: in C++ one on the CPU without memory, whose values are in ``inner``."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> GPUTensor:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check(func, args, kwargs)
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():  # the wrapper's shape; below that of what it wraps
                func(*args, **kwargs)
        result = func(*_each(_unwrapped, args), **{key: _each(_unwrapped, value) for key, value in kwargs.items()})
        if (written := _written(func)) is not None:
            return kwargs[written] if isinstance(written, str) else args[written]
        if not torch.is_inference_mode_enabled():
            return _each(cls, result)
        # In inference mode, too, a view of an ordinary tensor is an ordinary one.
        with torch.inference_mode(not func.is_view or args[0].is_inference()):
            return _each(cls, result)

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return DEVICE.index

    def cpu(self, *_: Any) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": DEVICE, **kwargs})

    def numpy(self, **_: Any) -> None:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    __array__ = numpy

    def __repr__(self, **_: Any) -> str:
        return f"GPUTensor({self.inner})"


class PretendGPU:
    """A context in which ``"cuda"`` is a device.

    Attributes:
        waits: how often the host had to wait for the GPU, by operation and line of the package's code.
    """

    active: PretendGPU | None = None

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self._stack = ExitStack()

    def __enter__(self) -> PretendGPU:
        PretendGPU.active = self
        self._stack.callback(setattr, PretendGPU, "active", None)
        # Modules keep their parameters, so that what refers to them sees them moved.
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        self._stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)

        makers = {function.__name__ for function in _device_constructors()}
        makers |= {f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")}
        for name in sorted(makers & vars(torch).keys()):
            self._replace(torch, name, _maker(getattr(torch, name)))
        for name in ("new_zeros", "new_ones", "new_full", "new_empty"):
            self._replace(Tensor, name, _maker(getattr(Tensor, name)))
        self._replace(Tensor, "to", _to(Tensor.to))
        self._replace(Tensor, "cuda", lambda tensor, *_, **__: tensor.to(DEVICE))
        self._replace(Tensor, "type_as", lambda tensor, other: tensor.to(other))
        self._replace(torch, "Generator", _generator)
        for owner in (torch, Tensor, F):
            for name in sorted(FLOAT32 & set(dir(owner))):
                self._replace(owner, name, _float32(getattr(owner, name)))
        self._replace(torch, "autocast", _Autocast)
        self._replace(torch.amp, "autocast", _Autocast)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._stack.enter_context(mock.patch.object(owner, name, value))


def _each(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``function`` of every tensor among the arguments or results of an operation."""
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_each(function, part) for part in value) if isinstance(value, (list, tuple)) else value


def _unwrapped(tensor: Tensor) -> Tensor:
    return tensor.inner if isinstance(tensor, GPUTensor) else tensor


@cache
def _written(func: Any) -> int | str | None:
    """The place or the name of the argument that an operation writes to and returns."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write and len(func._schema.returns) == 1:
            return argument.name if argument.kwarg_only else place
    return None


def _wait(operation: str) -> None:
    """Count a wait, at the innermost line of the package that is being executed."""
    frame = sys._getframe(1)
    while frame is not None and "/ovseg_d2/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is not None and PretendGPU.active is not None:
        place = f"{frame.f_code.co_filename.rpartition('/ovseg_d2/')[-1]}:{frame.f_lineno}"
        PretendGPU.active.waits[f"{operation} at {place}"] += 1


def _check(func: Any, args: Any, kwargs: Any) -> None:
    """Raise what CUDA would for tensors or a generator of the CPU, and count a wait."""
    checked = args
    if func in INDEXING:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        if masks:
            _wait("boolean index")
        if isinstance(args[0], GPUTensor):
            checked = (args[0], *args[2:])
    elif func in INDEX_FILLS and isinstance(args[0], GPUTensor):
        checked = (*args[:2], *args[3:])
    values = (*checked, *kwargs.values())
    leaves = [leaf for value in values for leaf in (value if isinstance(value, (list, tuple)) else (value,))]
    # PyTorch hands on another Python object of the same generator.
    if any(isinstance(x, torch._C.Generator) and x._cdata not in _gpu_generators for x in leaves):
        raise RuntimeError(f"{func}: expected a 'cuda' device type for generator but found 'cpu'")
    if func in COPIES:
        if func is aten.copy_.default and not isinstance(args[0], GPUTensor):
            _wait("copy_")
        return
    strays = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, GPUTensor)]
    if strays and torch._C._current_graph_task_id() != -1:
        # Zeros that autograd makes, in C++, of missing gradients.
        strays = [x for x in strays if x.any()]
    written = func._schema.is_mutable and any(x is args[0] for x in strays)
    if written or (strays and func in STRICT) or any(x.dim() for x in strays):
        shapes = ", ".join(str(tuple(x.shape)) for x in strays)
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found some on {DEVICE} and of shape {shapes} "
            "on the CPU"
        )
    repeats = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
    if func in WAITING or repeats:
        _wait(func.overloadpacket.__name__)


class _Move(torch.autograd.Function):
    """A copy on the other device."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.inner.clone() if isinstance(tensor, GPUTensor) else GPUTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Move.apply(gradient)


def _to(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``Tensor.to`` that knows the device."""

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, args = kwargs.pop("device", None), kwargs.pop("dtype", None), list(args)
        if "other" in kwargs:
            args.insert(0, kwargs.pop("other"))
        if args and isinstance(args[0], Tensor):
            other = args.pop(0)
            device, dtype = other.device, other.dtype
        elif args and not isinstance(args[0], torch.dtype):
            device = args.pop(0)
        if args and (args[0] is None or isinstance(args[0], torch.dtype)):
            dtype = args.pop(0) or dtype
        # What is left: non_blocking, copy.
        device = tensor.device if device is None else torch.device("cuda", device) if type(device) is int else device
        kind = torch.device(device).type
        if kind == "meta":
            return original(tensor, device, dtype, *args, **kwargs)
        if kind != tensor.device.type:
            if kind == "cpu":
                _wait("to cpu")
            tensor = _Move.apply(tensor)
        return original(tensor, dtype or tensor.dtype, *args, **kwargs)

    return to


def _maker(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes tensors, as ``original`` on the CPU and then moved."""

    def make(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is not None and torch.device(device).type == "meta":
            return original(*args, device=device, **kwargs)
        on_gpu = device is not None and torch.device(device).type == "cuda"
        generator = kwargs.get("generator")
        if generator is not None and (generator._cdata in _gpu_generators) != on_gpu:
            raise RuntimeError(f"expected a generator of the device {device or 'cpu'}, found one of {generator.device}")
        if original is torch._C._VariableFunctions.tensor and isinstance(args[0], (list, tuple)):
            # Numbers on the GPU in a list are fetched one by one.
            args = (_each(lambda x: x.item(), args[0]), *args[1:])
        made = original(*args, **kwargs)
        return made if device is None else made.to(device)

    return make


def _is_half(value: Any) -> bool:
    return isinstance(value, GPUTensor) and value.dtype in (torch.bfloat16, torch.float16)


def _float32(original: Callable[..., Any]) -> Callable[..., Any]:
    """As ``original``, but under autocast of float32 tensors."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(x.float() if _is_half(x) else x for x in args)
        return original(*args, **kwargs)

    return run


class _GPUGenerator(torch.Generator):
    """One of the GPU, as long as it lives."""

    device = property(lambda self: DEVICE)

    def __init__(self) -> None:
        _gpu_generators.add(self._cdata)

    def __del__(self) -> None:
        _gpu_generators.discard(self._cdata)


_gpu_generators: set[int] = set()
_CPUGenerator = torch.Generator


def _generator(device: Any = "cpu") -> torch.Generator:
    return _GPUGenerator() if torch.device(device).type == "cuda" else _CPUGenerator(device)


class _Autocast(torch.autocast):
    """Of the GPU: that of the CPU, whose tensors these are. Of the CPU: as if it were not there."""

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **_: Any) -> None:
        if device_type == "cpu":
            dtype, enabled = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
        super().__init__("cpu", dtype=dtype, enabled=enabled)
