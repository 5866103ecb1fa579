"""The classes of each image that a cost volume still holds, one row a pair of image and vocabulary entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

#: Logit of classes that were ruled out: the public code's, of those that its aggregation has no place for.
RULED_OUT_LOGIT = -100.0


@dataclass(frozen=True)
class ClassRows:
    """Which image and which entry each of R rows of a cost volume belongs to.

    Images may keep different entries, and different numbers of them; no row is made for an entry that was ruled out.

    Attributes:
        image_ids: (R,) int64 in [0, N), ascending.
        entry_ids: (R,) int64 in [0, E), ascending within an image.
        num_images: N.
        num_entries: E.
    """

    image_ids: Tensor
    entry_ids: Tensor
    num_images: int
    num_entries: int

    @classmethod
    def of_mask(cls, kept: Tensor) -> ClassRows:
        """Of the entries that each image keeps, (N, E) bool."""
        image_ids, entry_ids = kept.nonzero(as_tuple=True)
        return cls(image_ids, entry_ids, *kept.shape)

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def is_full(self) -> bool:
        """Whether no entry was ruled out anywhere."""
        return len(self) == self.num_images * self.num_entries

    def counts(self) -> Tensor:
        """(N,) int64, how many entries each image keeps."""
        # Not bincount, for which the host waits for a GPU.
        images = torch.arange(self.num_images, device=self.image_ids.device)
        return (self.image_ids == images[:, None]).sum(dim=1)

    def kept(self) -> Tensor:
        """(N, E) bool."""
        mask = torch.zeros(self.num_images, self.num_entries, dtype=torch.bool, device=self.image_ids.device)
        mask[self.image_ids, self.entry_ids] = True
        return mask

    def select(self, chosen: Tensor) -> ClassRows:
        """Some of the rows, chosen by (R,) bool."""
        return ClassRows(self.image_ids[chosen], self.entry_ids[chosen], self.num_images, self.num_entries)

    def of_entries(self, values: Tensor) -> Tensor:
        """What belongs to image and entry: (N, E, ...) -> (R, ...)."""
        return values.flatten(0, 1) if self.is_full else values[self.image_ids, self.entry_ids]

    def of_images(self, values: Tensor) -> Tensor:
        """What belongs to images: (N, ...) -> (R, ...), a view of one image, a copy of several."""
        return values.expand(len(self), *values.shape[1:]) if self.num_images == 1 else values[self.image_ids]

    def to_entries(self, values: Tensor, *, fill: float = RULED_OUT_LOGIT) -> Tensor:
        """(R, ...) -> (N, E, ...), with ``fill`` for entries without a row."""
        if self.is_full:
            return values.unflatten(0, (self.num_images, self.num_entries))
        filled = values.new_full((self.num_images, self.num_entries, *values.shape[1:]), fill)
        filled[self.image_ids, self.entry_ids] = values
        return filled

    def packed(self) -> tuple[ClassRows, Tensor | None]:
        """The same rows counted within each image: ``entry_ids`` 0, 1, 2, ... and as many entries as the image with
        most of them keeps; and (N, entries) bool, which places are taken, None if all are."""
        if self.is_full:
            return self, None
        counts = self.counts()
        starts = counts.cumsum(0) - counts
        places = torch.arange(len(self), device=counts.device) - starts[self.image_ids]
        most = int(counts.max())
        packed = ClassRows(self.image_ids, places, self.num_images, most)
        return packed, None if packed.is_full else packed.kept()


Output = TypeVar("Output", Tensor, tuple[Tensor, ...])


def in_chunks(function: Callable[..., Output], rows: ClassRows, *values: Tensor, size: int) -> Output:
    """Apply a function that treats every row alone, ``size`` rows at a time where no gradient is wanted, so that what
    it holds in between stays small: ``function(rows, *values)``, all values and all results (R, ...)."""
    if torch.is_grad_enabled() or len(rows) <= size:
        return function(rows, *values)
    outputs: tuple[Tensor, ...] = ()
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        chunk = ClassRows(rows.image_ids[part], rows.entry_ids[part], rows.num_images, rows.num_entries)
        result = function(chunk, *(value[part] for value in values))
        results = (result,) if isinstance(result, Tensor) else result
        if not outputs:
            outputs = tuple(x.new_empty((len(rows), *x.shape[1:])) for x in results)
        for whole, x in zip(outputs, results, strict=True):
            whole[part] = x
    return outputs[0] if isinstance(result, Tensor) else outputs
