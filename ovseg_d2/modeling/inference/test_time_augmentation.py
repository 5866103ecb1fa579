"""Multi-scale testing with flip: the mean of the class scores of an image at several sizes and of its mirror images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.data.image_io import read_image


class MultiScaleFlip(nn.Module):
    """Wraps a model of semantic results; takes and gives what it takes and gives, ``sem_seg`` alone.

    Each size is made from the file of the image, not from the image in the input, which is resized already; from the
    latter where there is no file.
    """

    def __init__(
        self, *, model: nn.Module, min_sizes: Sequence[int], max_size: int, flip: bool, image_format: str
    ) -> None:
        """
        Args:
            model: detectron2's inputs -> dicts with ``sem_seg`` (K, H, W) of the size that the input asks for.
            min_sizes: lengths of the shorter side.
            max_size: at most so long is the longer side.
            flip: each size is mirrored, too.
            image_format: RGB or BGR, of the images that the model takes.

        Raises:
            ValueError: no size, or one below 1.
        """
        super().__init__()
        if not min_sizes or min(min_sizes) < 1:
            raise ValueError(f"TEST.AUG.MIN_SIZES is {list(min_sizes)}; expected one or more sizes above 0")
        if max_size < max(min_sizes):
            raise ValueError(
                f"TEST.AUG.MAX_SIZE is {max_size}; expected at least {max(min_sizes)}, the largest of MIN_SIZES"
            )
        self.model = model
        self.resizes = [T.ResizeShortestEdge(size, max_size) for size in min_sizes]
        self.flip = flip
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> MultiScaleFlip:
        """What ``TEST.AUG`` says.

        Raises:
            ValueError: results are asked for that are not averaged.
        """
        tasks = list(cfg.MODEL.OVSEG.TEST.TASKS)
        if tasks != ["semantic"] or cfg.MODEL.OVSEG.TEST.ORACLE:
            raise ValueError(
                "TEST.AUG.ENABLED is True, which averages semantic results alone, but MODEL.OVSEG.TEST.TASKS is "
                f"{tasks} and MODEL.OVSEG.TEST.ORACLE {cfg.MODEL.OVSEG.TEST.ORACLE!r}; expected ['semantic'] and ''"
            )
        aug = cfg.TEST.AUG
        return cls(
            model=model,
            min_sizes=aug.MIN_SIZES,
            max_size=aug.MAX_SIZE,
            flip=aug.FLIP,
            image_format=cfg.INPUT.FORMAT,
        )

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """See the class; an input's ``proposals`` (Q, H, W) are resized and mirrored with its image."""
        return [{"sem_seg": self._mean(x)} for x in batched_inputs]

    def _mean(self, x: dict[str, Any]) -> Tensor:
        total: Tensor | None = None
        count = 0
        for version, is_flipped in self.versions(x):
            # Nothing keeps the scores of a version once they are added.
            total = _added(total, self._scores(version, is_flipped))
            count += 1
        return total.div_(count)

    def _scores(self, version: dict[str, Any], is_flipped: bool) -> Tensor:
        scores = self.model([version])[0]["sem_seg"]
        return scores.flip(-1) if is_flipped else scores

    def versions(self, x: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
        """The inputs that stand in for one input, one at a time, and whether each is mirrored."""
        if "file_name" in x:
            image = read_image(x["file_name"], self.image_format)
        else:
            image = np.ascontiguousarray(x["image"].permute(1, 2, 0).cpu().numpy())
        output = {"height": x.get("height", x["image"].shape[-2]), "width": x.get("width", x["image"].shape[-1])}
        for resize in self.resizes:
            pixels = resize.get_transform(image).apply_image(image)
            version = {**x, **output, "image": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))}
            if "proposals" in x:
                version["proposals"] = _resized_masks(x["proposals"], version["image"].shape[-2:])
            yield version, False
            if self.flip:
                yield {**version, **{key: version[key].flip(-1) for key in ("image", "proposals") if key in x}}, True


def _added(total: Tensor | None, scores: Tensor) -> Tensor:
    return scores.clone() if total is None else total.add_(scores)


def _resized_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """(Q, H, W) bool -> (Q, *size), the nearest pixels."""
    if masks.shape[-2:] == tuple(size):
        return masks
    return F.interpolate(masks[None].to(torch.uint8), size=tuple(size), mode="nearest-exact")[0].bool()
