"""Drawing of what the other modules find. Figures of matplotlib without its global state."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from ovseg_d2.visualization import Color, palette

NO_OBJECT = "no object"
DPI = 130
_BLANK = "#ffffff00"
_RIGHT, _WRONG, _BEST, _OTHER = "#3f9b57", "#c8553d", "#4a6f9c", "#b9c7d8"
_LEGEND = {
    _RIGHT: "right",
    _WRONG: "best, but wrong",
    _BEST: "best, not annotated",
    _BLANK: "* unseen in training",
}
# Inches: pictures, bars, the names beside them, the height of a card, maps.
_PICTURE, _BARS, _NAMES, _CARD, _MAP = 1.45, 1.0, 1.3, 1.35, 1.5


def proposal_cards(
    image: np.ndarray,
    masks: Tensor,
    probs: Mapping[str, Tensor],
    names: Sequence[str],
    *,
    top: int = 5,
    truth: Sequence[int] | None = None,
    unseen: Container[int] = (),
) -> Figure:
    """A card a mask: where it is, and each classifier's best classes with their probabilities; two cards a row if there
    is one classifier.

    Args:
        image: (H, W, 3) RGB uint8.
        masks: (R, H, W) bool.
        probs: by classifier (R, K), or (R, K + 1) with "no object" last.
        names: K.
        top: number of classes.
        truth: the class of each mask in the annotation, -1 if it has none; colours the bars.
        unseen: classes whose names get a star.
    """
    cards = 2 if len(probs) == 1 and len(masks) > 1 else 1  # in a row
    rows = -(-len(masks) // cards)
    widths = [_PICTURE * image.shape[1] / max(image.shape[:2]), *[_BARS] * len(probs)] * cards
    size = (sum(widths) + cards * len(probs) * _NAMES, _CARD * rows + 0.55)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths).reshape(rows * cards, -1)
    for axis in axes[len(masks) :].flat:
        axis.axis("off")
    used: set[str] = set()
    for row, (mask, card) in enumerate(zip(masks.cpu().numpy(), axes, strict=False)):
        _spotlight(card[0], image, mask)
        for axis, (title, values) in zip(card[1:], probs.items(), strict=True):
            best = values[row].float().cpu().topk(min(top, values.shape[1]))
            classes = best.indices.tolist()
            colors = _bar_colors(classes, None if truth is None else truth[row])
            labels = [(*names, NO_OBJECT)[k] + (" *" if k in unseen else "") for k in classes]
            used |= {*colors, *(_BLANK for k in classes if k in unseen)}
            _bars(axis, labels, best.values.tolist(), colors)
            if row < cards:
                axis.set_title(title, fontsize=10, fontweight="bold")
    legend = [Patch(color=color, label=label) for color, label in _LEGEND.items() if color in used]
    if truth is not None or _BLANK in used:
        figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=8, frameon=False)
    return figure


def heat_maps(
    image: np.ndarray, maps: Mapping[str, Tensor], words: Sequence[str], *, outlines: Sequence[Tensor | None] = ()
) -> Figure:
    """A row a kind of map, a column a word; each map from its smallest to its largest value, which stand below it.

    Args:
        image: (H, W, 3) RGB uint8.
        maps: by kind (W, H, W'), one for each of the words.
        outlines: where each word is in truth, (H, W') bool; None: not known.
    """
    outlines = outlines or [None] * len(words)
    height, width = _MAP * np.array(image.shape[:2]) / max(image.shape[:2])
    figure = Figure(figsize=(0.4 + width * (1 + len(words)), 0.22 + (height + 0.12) * len(maps)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, hspace=0, wspace=0)
    grid = figure.add_gridspec(len(maps), 1 + len(words))
    picture = figure.add_subplot(grid[:, 0])
    picture.imshow(image)
    picture.axis("off")
    lightness = 0.6 + 0.4 * (image @ np.array([0.299, 0.587, 0.114]) / 255)[..., None]
    for row, (kind, values) in enumerate(maps.items()):
        for column, (word, one) in enumerate(zip(words, values.float().cpu().numpy(), strict=True)):
            axis = figure.add_subplot(grid[row, 1 + column])
            low, high = float(one.min()), float(one.max())
            colors = colormaps["viridis"]((one - low) / max(high - low, 1e-12))[..., :3]
            axis.imshow(colors * lightness)
            if outlines[column] is not None:
                axis.contour(outlines[column].cpu().numpy(), levels=[0.5], colors="white", linewidths=1.0)
            axis.set_xlabel(f"{_short(low, high)} to {_short(high, high)}", fontsize=7.5, color="#555555", labelpad=2)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if not row:
                axis.set_title(word, fontsize=9.5, pad=3)
            if not column:
                axis.set_ylabel(kind, fontsize=9.5, fontweight="bold", labelpad=3)
    return figure


def _spotlight(axis: Axes, image: np.ndarray, mask: np.ndarray) -> None:
    """The mask as it is, the rest pale and grey."""
    grey = image.mean(axis=2, keepdims=True)
    axis.imshow(np.where(mask[..., None], image, 0.7 * 255 + 0.3 * grey).astype(np.uint8))
    for color, width in (("white", 2.0), ("black", 0.8)):
        axis.contour(mask, levels=[0.5], colors=color, linewidths=width)
    axis.axis("off")


def _bars(axis: Axes, labels: Sequence[str], values: Sequence[float], colors: Sequence[str]) -> None:
    places = range(len(labels))
    bars = axis.barh(places, values, height=0.68, color=colors)
    axis.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axis.set_yticks(places, labels, fontsize=9)
    axis.tick_params(axis="y", length=0, pad=3)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.spines["left"].set_color("#888888")


def _bar_colors(classes: Sequence[int], true_class: int | None) -> list[str]:
    colors = [_BEST] + [_OTHER] * (len(classes) - 1)
    if true_class is None or true_class < 0:
        return colors
    colors[0] = _WRONG
    return [_RIGHT if k == true_class else color for k, color in zip(classes, colors, strict=True)]


def _short(value: float, largest: float) -> str:
    """Two digits; 0 for what is nothing beside the largest value."""
    return "0" if abs(value) < 0.01 * abs(largest) else f"{value:.2g}"


def embedding_scatter(
    points: Tensor,
    labels: Tensor,
    texts: Tensor,
    text_ids: Sequence[int],
    names: Sequence[str],
    *,
    title: str,
    class_colors: Sequence[Color] | None = None,
) -> Figure:
    """Points in the colours of their classes, and class texts as stars with their names.

    Args:
        points, labels: (L, 2) and (L,) int64.
        texts, text_ids: (T, 2) and the classes of these.
        names: K.
        title: above the figure.
        class_colors: K colours, RGB in 0..1; by default a palette.
    """
    colors = np.array(class_colors or palette(len(names)))
    figure = Figure(figsize=(8, 8), layout="constrained")
    axis = figure.subplots()
    axis.scatter(*points.cpu().numpy().T, c=colors[labels.cpu().numpy()], s=22, edgecolors="#666666", linewidths=0.4)
    for k in sorted(set(labels.tolist())):
        middle = points[labels == k].median(dim=0).values.tolist()
        axis.annotate(names[k], middle, fontsize=8, ha="center", color=0.5 * colors[k])
    for (x, y), k in zip(texts.tolist(), text_ids, strict=True):
        axis.scatter([x], [y], c=[colors[k]], s=130, marker="*", edgecolors="black", linewidths=0.6)
        axis.annotate(names[k], (x, y), xytext=(5, 5), textcoords="offset points", fontsize=7, style="italic")
    axis.set_title(title, fontsize=10)
    axis.margins(0.08)  # for the names at the border
    axis.set_xticks([])
    axis.set_yticks([])
    return figure
