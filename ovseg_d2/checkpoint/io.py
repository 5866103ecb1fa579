"""Reading checkpoints without running what is in them, and writing them so that a kill cannot break them.

Knows files and tensors, no model.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
PICKLE_SUFFIXES = (".pkl", ".pickle")
# Where the tensors lie in the files of common training codes.
_WRAPPERS = ("model", "state_dict", "model_state_dict")
# The number at the start of torch's files from before they were zip archives, as a pickle has it.
_OLD_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"


def read_checkpoint(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> dict[str, Any]:
    """Read a checkpoint file into ``{"model": state dict, ...}``; never runs code that the file names.

    Args:
        path: a file of ``torch.save`` (read with ``weights_only``), of safetensors, or a pickle of numpy arrays
            (detectron2's model zoo). The content tells which; where it does not, the suffix.
        allow_pickle: pickles are refused without it.

    Returns:
        ``"model"``: tensors on the CPU by name, unwrapped from ``{"model": ...}`` or ``{"state_dict": ...}``; beside it
        what else the file holds (optimizer state, ``iteration``, ``matching_heuristics``, ...).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is corrupt, of an unknown kind, or holds more than data.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    suffix = _suffix_of_content(path) or path.suffix.lower()
    if suffix in TORCH_SUFFIXES:
        content = _read_torch(path)
    elif suffix == ".safetensors":
        content = _read_safetensors(path)
    elif suffix in PICKLE_SUFFIXES:
        content = _read_pickle(path, allow_pickle)
    else:
        allowed = ", ".join((*TORCH_SUFFIXES, ".safetensors", *PICKLE_SUFFIXES))
        raise ValueError(f"checkpoint {path}: unknown suffix {suffix!r}, allowed are {allowed}")
    return _unwrap(content, path)


def read_state_dict(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name; see :func:`read_checkpoint`."""
    return read_checkpoint(path, allow_pickle=allow_pickle)["model"]


def save_atomic(obj: Any, path: str | os.PathLike[str]) -> None:
    """Write ``obj`` as a ``.pth``-like or ``.safetensors`` file: whole, or not at all (see :func:`atomic_write`).

    A ``.safetensors`` file holds a flat dict of tensors, or the ``"model"`` of a checkpoint and nothing else of it.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors = obj["model"] if isinstance(obj.get("model"), Mapping) else obj
        with atomic_write(path) as file:
            file.write(safetensors.torch.save(_unshared(tensors)))
    elif path.suffix in TORCH_SUFFIXES:
        with atomic_write(path) as file:
            torch.save(obj, file)
    else:
        raise ValueError(f"cannot save {path}: allowed suffixes are {', '.join((*TORCH_SUFFIXES, '.safetensors'))}")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file that takes the name ``path`` only when all of it is on the disk.

    Whatever happens on the way (an exception, ``kill -9``, loss of power), ``path`` is the old file or all of the new
    one. The temporary name is fixed, so that the next save to ``path`` replaces what a killed one left behind.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """The name under which :func:`atomic_write` writes ``path``."""
    return path.with_name(f".{path.name}.tmp")


def _sync_folder(folder: Path) -> None:
    """A rename is durable only when the folder is on the disk too; Windows can neither do nor needs this."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies where tensors share memory, which safetensors refuses (tied weights)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


# ---- reading


def _suffix_of_content(path: Path) -> str:
    """The suffix that a file should have by its first bytes; "" if they say nothing."""
    with open(path, "rb") as file:
        head = file.read(32)
    if head.startswith(b"PK\x03\x04") or _OLD_TORCH in head:
        return ".pth"
    if head[8:9] == b"{":  # behind the length of the header
        return ".safetensors"
    return ".pkl" if head.startswith(b"\x80") else ""


def _read_torch(path: Path) -> Any:
    try:
        # Given a path, torch goes by its suffix.
        with _only_harmless_globals(), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noise in place of a pickle fails in all kinds of ways
        raise ValueError(_why_unreadable(path, error)) from error


def _why_unreadable(path: Path, error: Exception) -> str:
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
        return (
            f"checkpoint {path} refused: it names {refused[1]}, and reading it could run code; only tensors, numpy "
            'arrays, numbers and text are read (where you trust the file, save {"model": its state dict} anew)'
        )
    reason = " ".join(str(error).split()).removesuffix(".")[:160] or type(error).__name__
    return f"checkpoint {path} cannot be read: truncated, corrupt or not a checkpoint of tensors ({reason})"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(_why_unreadable(path, error)) from error


def _read_pickle(path: Path, allow_pickle: bool) -> Any:
    if not allow_pickle:
        raise ValueError(
            f"checkpoint {path} refused: it is a Python pickle, a program that runs while it is "
            "read; for one whose origin you trust set CHECKPOINT.ALLOW_PICKLE True"
        )
    try:
        with open(path, "rb") as file:
            return _NumpyUnpickler(file, encoding="latin1").load()
    except Exception as error:  # noise in place of a pickle fails in all kinds of ways
        raise ValueError(_why_unreadable(path, error)) from error


def _unwrap(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {path} holds a {type(content).__name__}, expected a dict of tensors")
    extras: dict[str, Any] = {}
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            extras = {name: value for name, value in content.items() if name != wrapper}
            content = content[wrapper]
            break
    tensors = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray | np.generic):
            value = torch.as_tensor(value)
        if isinstance(value, Tensor):
            tensors[name] = value.detach()
    if not tensors:
        found = ", ".join(map(str, list(content)[:5])) or "nothing"
        raise ValueError(f"checkpoint {path} holds no tensors; found {found}")
    # The prefix that saving a model inside DistributedDataParallel leaves.
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return {**extras, "model": tensors}


# ---- what a file may name


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Stands for ``defaultdict``, which torch's restricted unpickler builds but cannot fill."""
    return {}


def _named(function: Callable[..., Any], full_name: str) -> Callable[..., Any]:
    """``function`` under the name by which files know it: torch finds what is allowed by module and name."""

    def stand_in(*args: Any) -> Any:
        return function(*args)

    stand_in.__module__, _, name = full_name.rpartition(".")
    stand_in.__name__ = stand_in.__qualname__ = name
    return stand_in


def _harmless_globals() -> dict[str, Callable[..., Any]]:
    """What a file may name beside torch's own: numpy arrays and scalars (of numpy 1 and 2), plain containers."""
    array = np.zeros(1)
    functions = {
        "multiarray._reconstruct": array.__reduce__()[0],
        "multiarray.scalar": array[0].__reduce__()[0],
        "numeric._frombuffer": array.__reduce_ex__(5)[0],
    }
    functions = {f"numpy.{core}.{name}": f for name, f in functions.items() for core in ("core", "_core")}
    functions["collections.defaultdict"] = _plain_dict
    names = {name: _named(function, name) for name, function in functions.items()}

    # numpy has a class a dtype, and torch asks for the class of what a file builds.
    dtypes = {type(np.dtype(kind)) for kind in np.sctypeDict.values()}
    plain = (list, dict, set, int, float, collections.OrderedDict, argparse.Namespace, codecs.encode)
    for thing in (np.ndarray, np.dtype, *dtypes, *plain):
        names[f"{thing.__module__}.{thing.__name__}"] = thing
    return names


_HARMLESS = _harmless_globals()


class _NumpyUnpickler(pickle.Unpickler):
    """An unpickler that resolves harmless names only."""

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full_name not in _HARMLESS:
            raise pickle.UnpicklingError(f"GLOBAL {full_name}")
        return _HARMLESS[full_name]


@contextmanager
def _only_harmless_globals() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` build the harmless names, and take back the permission afterwards."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(list(_HARMLESS.values()))
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
