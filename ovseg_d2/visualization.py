"""Draws semantic, panoptic and instance results on images, and sheets of such pictures."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from ovseg_d2.evaluation.panoptic_png import read_panoptic_png

Color = tuple[float, float, float]
Segment = tuple[np.ndarray, Color, str]  # mask (H, W), colour, name
TASKS = ("semantic", "panoptic", "instance")
MIN_LABELLED_SHARE = 0.002  # of the picture: smaller segments are drawn without their name


class ResultDrawer:
    """Draws results in the colours of their classes; the same input always gives the same picture.

    Args:
        class_names: K names.
        class_colors: K colours, RGB in 0..1; by default a palette that depends on the class index alone.
    """

    def __init__(self, *, class_names: Sequence[str], class_colors: Sequence[Color] | None = None) -> None:
        self.class_names = tuple(class_names)
        self.class_colors = tuple(class_colors or palette(len(self.class_names)))
        if len(self.class_colors) != len(self.class_names):
            raise ValueError(f"{len(self.class_names)} class names but {len(self.class_colors)} colours")

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> ResultDrawer:
        """Names and colours of a dataset; classes without a colour get one of the palette."""
        kind = "stuff" if hasattr(metadata, "stuff_classes") else "thing"
        names = getattr(metadata, f"{kind}_classes")
        colors = getattr(metadata, f"{kind}_colors", None)
        if colors is None or len(colors) != len(names):
            return cls(class_names=names)
        return cls(class_names=names, class_colors=[tuple(channel / 255 for channel in color) for color in colors])

    def draw(
        self,
        image: np.ndarray,
        results: dict[str, Any],
        task: str,
        *,
        scale: int = 1,
        score_threshold: float = 0.0,
        hatch_rest: bool = False,
    ) -> np.ndarray:
        """Draws one kind of result.

        Args:
            image: (H, W, 3) RGB uint8.
            results: a model's output for this image.
            task: semantic, panoptic or instance.
            scale: the picture is this many times as large as the image; small images need it for legible names.
            score_threshold: instances below are left out.
            hatch_rest: what no segment covers is hatched.

        Returns:
            (scale * H, scale * W, 3) RGB uint8.
        """
        if task == "semantic":
            segments = self._semantic_segments(results["sem_seg"])
        elif task == "panoptic":
            segments = self._panoptic_segments(*results["panoptic_seg"])
        elif task == "instance":
            segments = self._instance_segments(results["instances"], score_threshold)
        else:
            raise ValueError(f"task {task!r} is unknown, allowed are {', '.join(TASKS)}")
        return _draw_segments(image, segments, scale, hatch_rest)

    def draw_masks(
        self,
        image: np.ndarray,
        class_ids: torch.Tensor,
        masks: torch.Tensor,
        *,
        scale: int = 1,
        hatch_rest: bool = False,
    ) -> np.ndarray:
        """Draws masks (M, H, W) bool, which may overlap, in the colours and with the names of their classes (M,).

        Args:
            image, scale, hatch_rest: see :meth:`draw`.
        """
        classes = class_ids.tolist()
        segments = [
            (mask, color, self.class_names[k])
            for mask, color, k in zip(masks.cpu().numpy(), self._shades(classes), classes, strict=True)
        ]
        return _draw_segments(image, segments, scale, hatch_rest)

    def _semantic_segments(self, sem_seg: torch.Tensor) -> Iterable[Segment]:
        """Segments of class scores (K, H, W) or class indices (H, W); indices outside the classes are not drawn."""
        labels = (sem_seg.argmax(dim=0) if sem_seg.ndim == 3 else sem_seg).cpu().numpy()
        for k in np.unique(labels):
            if 0 <= k < len(self.class_names):
                yield labels == k, self.class_colors[k], self.class_names[k]

    def _panoptic_segments(self, ids: torch.Tensor, segments_info: list[dict]) -> Iterable[Segment]:
        ids = ids.cpu().numpy()
        for segment, color in zip(segments_info, self._shades([s["category_id"] for s in segments_info]), strict=True):
            yield ids == segment["id"], color, self.class_names[segment["category_id"]]

    def _instance_segments(self, instances: Instances, score_threshold: float) -> Iterable[Segment]:
        instances = instances.to("cpu")
        instances = instances[instances.scores >= score_threshold]
        classes = instances.pred_classes.tolist()
        masks = instances.pred_masks.numpy() > 0
        for mask, k, score, color in zip(masks, classes, instances.scores.tolist(), self._shades(classes), strict=True):
            yield mask, color, f"{self.class_names[k]} {score:.0%}"

    def _shades(self, classes: Sequence[int]) -> list[Color]:
        """The classes' colours, lighter or darker for the second and further segments of a class."""
        shifts = (0.0, 0.16, -0.14, 0.28, -0.24)
        seen: dict[int, int] = {}
        shades = []
        for k in classes:
            hue, lightness, saturation = colorsys.rgb_to_hls(*self.class_colors[k])
            shift = shifts[seen.get(k, 0) % len(shifts)]
            shades.append(colorsys.hls_to_rgb(hue, min(max(lightness + shift, 0.12), 0.92), saturation))
            seen[k] = seen.get(k, 0) + 1
        return shades


def ground_truth_results(record: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    """Annotations of a panoptic dataset dict in the form of a model's results, so that they can be drawn beside them.

    Args:
        record: has ``pan_seg_file_name`` and ``segments_info`` with contiguous classes.
        metadata: of its dataset.
    """
    ids = read_panoptic_png(record["pan_seg_file_name"])
    things = set(metadata.thing_dataset_id_to_contiguous_id.values())
    segments = [s | {"isthing": s["category_id"] in things} for s in record["segments_info"] if not s.get("iscrowd", 0)]
    labels = np.full(ids.shape, -1)
    for segment in segments:
        labels[ids == segment["id"]] = segment["category_id"]
    objects = [s for s in segments if s["isthing"]]
    instances = Instances(
        ids.shape,
        pred_masks=torch.from_numpy(ids == np.array([s["id"] for s in objects]).reshape(-1, 1, 1)),
        scores=torch.ones(len(objects)),
        pred_classes=torch.tensor([s["category_id"] for s in objects], dtype=torch.int64),
    )
    return {
        "sem_seg": torch.from_numpy(labels),
        "panoptic_seg": (torch.from_numpy(ids), segments),
        "instances": instances,
    }


def palette(num_colors: int) -> list[Color]:
    """Colours whose neighbours differ in hue (golden-ratio steps) and lightness."""
    lightness, saturation = (0.55, 0.42, 0.68), (0.75, 0.6)
    return [colorsys.hls_to_rgb(k * 0.618034 % 1, lightness[k % 3], saturation[k % 2]) for k in range(num_colors)]


def legible_scale(height: int, width: int, *, target: int = 384) -> int:
    """The whole factor that brings an image's longer side to about ``target`` pixels; 1 for larger images."""
    return max(1, round(target / max(height, width)))


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    columns: Sequence[str],
    captions: Sequence[str] | None = None,
    title: str | None = None,
    cell: int = 384,
) -> Image.Image:
    """A sheet of pictures: a row an image, a column a kind of picture.

    Args:
        rows: pictures (H, W, 3) RGB uint8; sizes may differ, each is fitted into a square cell.
        columns: a heading for each column.
        captions: a line under each row, its image's name for example.
        title: a line above all.
        cell: side of a cell in pixels; smaller pictures are enlarged.
    """
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"{len(columns)} column headings, but rows of {sorted({len(row) for row in rows})} pictures")
    margin, gap = 28, 14
    heading, caption, headline = _font(20, bold=True), _font(15), _font(28, bold=True)
    fitted = [[_fit(picture, cell) for picture in row] for row in rows]
    caption_height = 30 if captions else 0
    heights = [max(picture.height for picture in row) + caption_height + gap for row in fitted]
    top = margin + (54 if title else 0)
    width = 2 * margin + len(columns) * (cell + gap) - gap
    sheet = Image.new("RGB", (width, top + 36 + sum(heights) - gap + margin), (250, 250, 248))
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((margin, margin - 4), title, font=headline, fill=(25, 25, 30))
    for column, name in enumerate(columns):
        pen.text((margin + column * (cell + gap), top), name, font=heading, fill=(60, 60, 70))
    y = top + 36
    for number, (row, height) in enumerate(zip(fitted, heights, strict=True)):
        for column, picture in enumerate(row):
            sheet.paste(picture, (margin + column * (cell + gap), y))
        if captions:
            pen.text(
                (margin, y + height - gap - caption_height + 5), captions[number], font=caption, fill=(110, 110, 120)
            )
        y += height
    return sheet


def _draw_segments(image: np.ndarray, segments: Iterable[Segment], scale: int, hatch_rest: bool) -> np.ndarray:
    """Draws segments from large to small, their names on top of all of them."""
    size = (image.shape[1] * scale, image.shape[0] * scale)  # width, height
    picture = np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    # Bilinear enlargement rounds the pixel stairs of small masks off.
    drawn = [
        (cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > 0.5, color, name)
        for mask, color, name in segments
    ]
    drawn.sort(key=lambda segment: -int(segment[0].sum()))
    if hatch_rest:
        _hatch(picture, ~np.any([mask for mask, _, _ in drawn], axis=0) if drawn else np.ones(size[::-1], dtype=bool))
    for mask, color, _ in drawn:
        picture[mask] = 0.45 * picture[mask] + 0.55 * 255 * np.array(color)
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, (255, 255, 255), thickness=1, lineType=cv2.LINE_AA)
    canvas = Visualizer(picture)
    taken = np.zeros(size[::-1], dtype=np.uint8)
    for mask, color, name in reversed(drawn):  # small segments have the least choice of places
        if mask.sum() >= MIN_LABELLED_SHARE * mask.size:
            font_size = 7 + 4 * min(1.0, math.sqrt(mask.sum()) / 300)
            canvas.draw_text(
                name, _label_position(mask, name, font_size, taken), color=_light(color), font_size=font_size
            )
    return canvas.output.get_image()


def _hatch(picture: np.ndarray, mask: np.ndarray) -> None:
    """Makes a part of a picture grey and hatches it, in place."""
    grey = picture[mask].mean(axis=1, keepdims=True)
    y, x = np.nonzero(mask)
    stripe = ((x + y) % 12 < 3)[:, None]
    picture[mask] = np.where(stripe, 235, 0.45 * grey + 70)


def _label_position(mask: np.ndarray, name: str, font_size: float, taken: np.ndarray) -> tuple[float, float]:
    """x (middle) and y (top) of a name at the mask's most interior point where it stays in the picture and, if there is
    such a place in the mask, off the names that are there already.

    Args:
        taken: (H, W) uint8, 1 where names are; this one is added.
    """
    height, width = mask.shape
    # A point is 100/72 pixels at matplotlib's resolution; letters are about 0.6 as wide as high.
    text_height = font_size * 100 / 72
    half_width, half_height = min(0.3 * text_height * len(name) + 2, width / 2), min(0.7 * text_height, height / 2)
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
    box = np.ones((2 * math.ceil(half_height) + 1, 2 * math.ceil(half_width) + 1), dtype=np.uint8)
    free = np.where(cv2.dilate(taken, box), 0, depth)
    y, x = np.unravel_index((free if free.any() else depth).argmax(), depth.shape)
    x = float(np.clip(x, half_width, width - half_width))
    y = float(np.clip(y, half_height, height - half_height))
    rows, columns = (
        slice(max(0, round(middle - half)), round(middle + half))
        for middle, half in ((y, half_height), (x, half_width))
    )
    taken[rows, columns] = 1
    return x, y - text_height / 2


def _light(color: Color) -> Color:
    hue, lightness, saturation = colorsys.rgb_to_hls(*color)
    return colorsys.hls_to_rgb(hue, max(lightness, 0.8), saturation)


def _fit(picture: np.ndarray, side: int) -> Image.Image:
    """Picture enlarged or reduced until it just fits into a square."""
    image = Image.fromarray(picture)
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS)


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along."""
    weight = "bold" if bold else "normal"
    return ImageFont.truetype(
        font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight)), size
    )
