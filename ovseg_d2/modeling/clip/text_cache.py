"""Encoded vocabularies on disk, one file for each tower and list of tokens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from detectron2.utils import comm
from torch import Tensor

from ovseg_d2.checkpoint.io import atomic_write

logger = logging.getLogger(__name__)


def cached_on_disk(encode: Callable[[], Tensor], folder: str, *, weights_hash: str, tokens: Tensor) -> Tensor:
    """``encode()``, or what it gave when it was last called for the same weights and tokens.

    A damaged file is made anew, with a warning; a folder that cannot be written costs a warning too.

    Args:
        encode: -> (E, P, D) float32.
        tokens: (E, P, L) int64 of the texts.

    Returns:
        (E, P, D) float32, on the CPU if it comes from the disk.
    """
    key = f"{weights_hash} {tuple(tokens.shape)} ".encode() + tokens.cpu().contiguous().numpy().tobytes()
    path = Path(folder) / f"{hashlib.sha256(key).hexdigest()}.safetensors"
    if path.exists():
        try:
            return _read(path, tokens)
        except (ValueError, OSError, safetensors.SafetensorError) as error:
            logger.warning("text cache %s cannot be used (%s); it is made anew", path, error)
    embeds = encode()
    if comm.is_main_process():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, embeds)
        except OSError as error:
            logger.warning("text cache %s cannot be written (%s)", path, error)
    return embeds


def _read(path: Path, tokens: Tensor) -> Tensor:
    with safetensors.safe_open(path, "pt") as file:
        found = (file.metadata() or {}).get("sha256")
        embeds = file.get_tensor("embeds") if "embeds" in file.keys() else torch.zeros(())
    # The file format finds a missing end, but not a changed byte.
    if embeds.shape[:2] != tokens.shape[:2] or found != _checksum(embeds):
        raise ValueError("its content is not what was written")
    return embeds


def _write(path: Path, embeds: Tensor) -> None:
    embeds = embeds.detach().cpu().contiguous()
    with atomic_write(path) as file:
        file.write(safetensors.torch.save({"embeds": embeds}, metadata={"sha256": _checksum(embeds)}))


def _checksum(embeds: Tensor) -> str:
    return hashlib.sha256(embeds.numpy().tobytes()).hexdigest()
