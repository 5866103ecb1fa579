"""OpenAI's own files: TorchScript archives, turned once into safetensors."""

from __future__ import annotations

import hashlib
import logging
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ovseg_d2.checkpoint.io import read_state_dict, save_atomic
from ovseg_d2.modeling.clip.state_dict import OPENAI_ENTRIES

logger = logging.getLogger(__name__)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive rather than a pickle of tensors."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(Path(name).name == "constants.pkl" for name in archive.namelist())


def read_torchscript(path: Path, cache_dir: Path) -> dict[str, Tensor]:
    """The weights in a TorchScript archive, under open_clip's names, which are OpenAI's.

    They are kept in ``cache_dir`` as safetensors, so that PyTorch's loader of programs runs once a file.

    Raises:
        ValueError: the archive is broken.
    """
    cached = cache_dir / f"{path.stem}-{_fingerprint(path)}.safetensors"
    if cached.is_file():
        return read_state_dict(cached)
    try:
        with warnings.catch_warnings():
            # PyTorch advises against writing such archives; these are as they are.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            state_dict = torch.jit.load(path, map_location="cpu").state_dict()
    except RuntimeError as error:
        raise ValueError(f"CLIP weights {path} cannot be read: a broken TorchScript archive") from error
    weights = {name: tensor.detach() for name, tensor in state_dict.items() if name not in OPENAI_ENTRIES}
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        save_atomic(weights, cached)
    except OSError as error:
        logger.warning(f"{path} was read, but not kept as {cached}, and has to be converted again next time: {error}")
    return weights


def _fingerprint(path: Path) -> str:
    """Changes with the contents: from the checksums in the archive's directory, without reading the gigabytes."""
    with zipfile.ZipFile(path) as archive:
        entries = "".join(f"{entry.filename} {entry.file_size} {entry.CRC}\n" for entry in archive.infolist())
    return hashlib.sha256(entries.encode()).hexdigest()[:12]
