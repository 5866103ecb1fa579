"""Mask proposals on disk: one file of JSON lines a dataset, written once and read by image.

The first line says what the file is; each further one holds the masks of one image, at the image's own size, as COCO's
compressed run lengths. A file that is cut off (an interrupted export) is whole up to its last complete line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

Array = np.ndarray
FORMAT = "ovseg_d2 mask proposals 1"
_ID = re.compile(rb'\{"image_id": ("(?:[^"\\]|\\.)*"|-?\d+), ')


def proposal_path(folder: str | Path, dataset_name: str) -> Path:
    """The file of a dataset in a folder that ``tools/export_proposals.py`` wrote."""
    return Path(folder) / f"{dataset_name}.jsonl"


def encode_line(
    *, image_id: Hashable, file_name: str, masks: Array, scores: Sequence[float] | None = None
) -> dict[str, Any]:
    """A line for the masks (Q, H, W) bool of an image, with their scores if there are any."""
    codes = mask_util.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8))) if len(masks) else []
    line = {
        "image_id": image_id,
        "file_name": file_name,
        "size": [int(n) for n in masks.shape[1:]],
        "counts": [code["counts"].decode() for code in codes],
    }
    return line if scores is None else {**line, "scores": [round(float(score), 4) for score in scores]}


class ProposalWriter:
    """Appends to a dataset's file; starts it, or goes on after its last whole line.

    Attributes:
        done: ids of the images that are in the file.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        """
        Args:
            path: the file.
            header: what the masks come from; a file that is there already must have the same.

        Raises:
            ValueError: the file is of something else.
        """
        self.path = Path(path)
        header = {"format": FORMAT, **header}
        self.done: set[Hashable] = set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and self.path.stat().st_size:
            reader = ProposalReader(self.path)
            different = [key for key in header if reader.header.get(key) != header[key]]
            if different:
                raise ValueError(
                    f"{self.path} holds proposals of {different[0]} {reader.header.get(different[0])!r}, not "
                    f"{header[different[0]]!r}; give another folder, or delete it"
                )
            self.done = set(reader.image_ids)
            with open(self.path, "r+b") as file:
                file.truncate(reader.end)
            self._file = open(self.path, "a", encoding="ascii")
        else:
            self._file = open(self.path, "w", encoding="ascii")
            self._write(header)

    def add(self, *, image_id: Hashable, file_name: str, masks: Array, scores: Sequence[float] | None = None) -> None:
        """See :func:`encode_line`."""
        self._write(encode_line(image_id=image_id, file_name=file_name, masks=masks, scores=scores))
        self.done.add(image_id)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(f"{json.dumps(line)}\n")
        self._file.flush()

    def __enter__(self) -> ProposalWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class ProposalReader:
    """Finds an image's masks in a file; keeps no more of the file in memory than where each image stands.

    Attributes:
        header: the first line.
        end: bytes up to the last whole line.
    """

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a file of proposals.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"mask proposals {self.path} do not exist; tools/export_proposals.py writes them")
        self._places: dict[Hashable, int] = {}
        with open(self.path, "rb") as file:
            self.header = self._header(file.readline())
            self.end = file.tell()
            for number, line in enumerate(file, start=2):
                if not line.endswith(b"\n"):
                    break
                found = _ID.match(line)
                if not found:
                    raise ValueError(f"mask proposals {self.path}, line {number}: no image_id at its start")
                self._places[json.loads(found[1])] = self.end
                self.end += len(line)

    @property
    def image_ids(self) -> list[Hashable]:
        return list(self._places)

    def __contains__(self, image_id: Hashable) -> bool:
        return image_id in self._places

    def masks(self, image_id: Hashable, size: tuple[int, int], *, name: str = "") -> Array:
        """Masks (Q, H, W) uint8 of an image.

        Args:
            size: (height, width) of the image.
            name: what errors call the image; by default its id.

        Raises:
            ValueError: the image is not in the file, or has another size there.
        """
        name = name or f"image {image_id!r}"
        if image_id not in self._places:
            raise ValueError(
                f"{name} (image_id {image_id!r}) has no mask proposals in {self.path}, which holds {len(self._places)} "
                "images; tools/export_proposals.py goes on where it stopped"
            )
        with open(self.path, "rb") as file:
            file.seek(self._places[image_id])
            line = json.loads(file.readline())
        if tuple(line["size"]) != tuple(size):
            raise ValueError(f"{name} is {size[0]} x {size[1]}, but {self.path} has masks of {line['size']} for it")
        if not line["counts"]:
            return np.zeros((0, *size), np.uint8)
        codes = [{"size": line["size"], "counts": counts.encode()} for counts in line["counts"]]
        return np.ascontiguousarray(mask_util.decode(codes).transpose(2, 0, 1))

    def _header(self, line: bytes) -> dict[str, Any]:
        try:
            header = json.loads(line)
        except ValueError:
            header = None
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ValueError(f"{self.path} is not a file of mask proposals: its first line has no format {FORMAT!r}")
        return header
