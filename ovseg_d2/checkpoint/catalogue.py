"""``ovseg://NAME``: public checkpoints by name, downloaded, verified and converted once.

What the catalogue knows is in ``catalogue.json``: for every checkpoint the format that its content must have
(:mod:`key_maps`), the address, the SHA-256 sum or the beginning of it that file names of torchvision have, where they
are known, and the page and licence of its project.
"""

from __future__ import annotations

import hashlib
import json
import logging
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import file_lock, get_cache_dir
from tqdm import tqdm

from ovseg_d2 import __version__
from ovseg_d2.checkpoint.convert import convert_checkpoint, unknown_format
from ovseg_d2.checkpoint.io import atomic_write, read_state_dict, save_atomic

logger = logging.getLogger(__name__)

PREFIX = "ovseg://"
_TABLE = Path(__file__).with_name("catalogue.json")
_CHUNK = 2**20
_TIMEOUT = 30.0


class CatalogueError(ValueError):
    """A checkpoint of the catalogue that cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Entry:
    """One public checkpoint.

    Attributes:
        name: in ``ovseg://NAME``.
        title: what it is, for messages.
        format: name of the key map that must recognise it.
        file: its name in the folder of downloads.
        page: where its project describes it.
        licence: of the weights, as the project states it; "" if only its page tells.
        url: "" if it is handed out by a page alone.
        sha256: the sum, or its first digits; "" if it is not published.
        config: the configuration that it belongs to, below ``configs``; "" for backbones.
    """

    name: str
    title: str
    format: str
    file: str
    page: str
    licence: str = ""
    url: str = ""
    sha256: str = ""
    config: str = ""

    @property
    def original(self) -> Path:
        """Where the file lies as it was published: downloaded, or put there by hand."""
        return folder() / self.file

    @property
    def converted(self) -> Path:
        """Where it lies in our names. They may change with the version."""
        return folder() / f"{self.name}-{__version__}.safetensors"


def folder() -> Path:
    """Where the files are kept: beside detectron2's own downloads (``$FVCORE_CACHE``)."""
    return Path(get_cache_dir()) / "ovseg_d2"


@cache
def catalogue() -> dict[str, Entry]:
    """All checkpoints by name."""
    table = json.loads(_TABLE.read_text())
    entries = {}
    for name, values in table["checkpoints"].items():
        project = table["projects"][values.pop("project")]
        entries[name] = Entry(name=name, **{**project, **values})
    return entries


def fetch(name: str) -> Path:
    """The converted file of a checkpoint, which is downloaded, verified and converted if it is not there.

    Processes that ask for the same one wait for the first.

    Raises:
        CatalogueError: there is none of this name; it cannot be downloaded; it is not what the catalogue expects.
    """
    if name not in catalogue():
        raise CatalogueError(f"{PREFIX}{name} is not in the catalogue, which has {', '.join(catalogue())}")
    entry = catalogue()[name]
    with file_lock(str(entry.converted)):
        if not entry.converted.is_file():
            downloaded = not entry.original.is_file()
            if downloaded:
                _download(entry)
            try:
                _verify(entry)
                _convert(entry)
            except ValueError as error:
                if downloaded:
                    entry.original.unlink()
                removed = "; it was removed" if downloaded else ""
                raise CatalogueError(f"{PREFIX}{name}: {error}{removed}; {_by_hand(entry)}") from error
    return entry.converted


def _download(entry: Entry) -> None:
    if not entry.url:
        raise CatalogueError(f"{PREFIX}{entry.name} has no address of its own; {_by_hand(entry)}")
    logger.info(f"Downloading {entry.title} from {entry.url} to {entry.original} ({_licence(entry)})")
    try:
        with urllib.request.urlopen(entry.url, timeout=_TIMEOUT) as response, atomic_write(entry.original) as file:
            length = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=length or None, unit="B", unit_scale=True, desc=entry.name, leave=False) as bar:
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
                if length and bar.n != length:
                    raise OSError(f"{bar.n} of {length} bytes came")
    except (urllib.error.URLError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CatalogueError(f"{PREFIX}{entry.name} could not be downloaded ({reason}); {_by_hand(entry)}") from error


def _verify(entry: Entry) -> None:
    digest = hashlib.sha256()
    with open(entry.original, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    if not entry.sha256:
        logger.warning(f"{entry.original}: SHA-256 {found}; none is published to compare it with")
    elif not found.startswith(entry.sha256):
        raise ValueError(f"{entry.original} has the SHA-256 {found}, expected {entry.sha256}")


def _convert(entry: Entry) -> None:
    # Pickles are read with names of numpy alone allowed, so that they cannot run code.
    public = read_state_dict(entry.original, allow_pickle=True)
    conversion = convert_checkpoint(public)
    if conversion.key_map is None:
        raise ValueError(unknown_format(public, str(entry.original)))
    if conversion.key_map.name != entry.format:
        raise ValueError(f"{entry.original} is a file of {conversion.key_map.name}, expected {entry.format}")
    save_atomic(conversion.weights, entry.converted)
    logger.info(f"{entry.original} -> {entry.converted} ({conversion})")


def _by_hand(entry: Entry) -> str:
    source = f"{entry.url}, or from {entry.page}," if entry.url else entry.page
    return f"fetch {entry.title} from {source} and put it at {entry.original} ({_licence(entry)})"


def _licence(entry: Entry) -> str:
    return f"licence: {entry.licence or 'see the page'}"


class CatalogueHandler(PathHandler):
    """``ovseg://NAME`` -> the converted file."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, **kwargs: Any) -> str:
        return str(fetch(path.removeprefix(PREFIX)))

    def _open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        return open(self._get_local_path(path), mode, **kwargs)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return path.removeprefix(PREFIX) in catalogue()

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return self._exists(path)


PathManager.register_handler(CatalogueHandler(), allow_override=True)
