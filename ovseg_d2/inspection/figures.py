"""Drawing of what the other modules find. Figures of matplotlib without its global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from ovseg_d2.visualization import palette

NO_OBJECT = "no object"


def proposal_cards(
    image: np.ndarray, masks: Tensor, probs: Mapping[str, Tensor], names: Sequence[str], *, top: int = 5
) -> Figure:
    """A row a mask: where it is, and each classifier's best classes with their probabilities.

    Args:
        image: (H, W, 3) RGB uint8.
        masks: (R, H, W) bool.
        probs: by classifier (R, K), or (R, K + 1) with "no object" last.
        names: K.
        top: number of classes.
    """
    rows, columns = len(masks), 1 + len(probs)
    figure = Figure(figsize=(3.2 * columns, 0.4 + 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, mask in enumerate(masks.cpu().numpy()):
        shown = image.copy()
        shown[mask] = (0.45 * shown[mask] + 0.55 * np.array([40, 200, 80])).astype(np.uint8)
        axes[row, 0].imshow(shown)
        axes[row, 0].contour(mask, levels=[0.5], colors="white", linewidths=0.8)
        axes[row, 0].axis("off")
        for axis, (title, values) in zip(axes[row, 1:], probs.items(), strict=True):
            best = values[row].float().cpu().topk(min(top, values.shape[1]))
            labels = [(*names, NO_OBJECT)[k] for k in best.indices.tolist()]
            places = range(len(labels))
            bars = axis.barh(places, best.values.tolist(), color=["#c0504d"] + ["#9fb6d0"] * (len(labels) - 1))
            axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
            axis.set_yticks(places, labels, fontsize=8)
            axis.invert_yaxis()
            axis.set_xlim(0, 1.15)
            axis.set_xticks([])
            axis.spines[["top", "right", "bottom"]].set_visible(False)
            if not row:
                axis.set_title(title, fontsize=10)
    return figure


def heat_maps(image: np.ndarray, maps: Mapping[str, Tensor], words: Sequence[str]) -> Figure:
    """A row a kind of map, a column a word; each map from its smallest to its largest value.

    Args:
        image: (H, W, 3) RGB uint8.
        maps: by kind (W, H, W'), one for each of the words.
    """
    figure = Figure(figsize=(2.2 * (1 + len(words)), 0.3 + 2.3 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), 1 + len(words), squeeze=False)
    for row, (kind, values) in enumerate(maps.items()):
        axes[row, 0].imshow(image)
        axes[row, 0].set_title(kind, fontsize=10)
        for axis, word, one in zip(axes[row, 1:], words, values.float().cpu().numpy(), strict=True):
            axis.imshow(image)
            axis.imshow(one, cmap="jet", alpha=0.55)
            axis.set_title(f"{word}\n{one.min():.2g} to {one.max():.2g}", fontsize=8)
        for axis in axes[row]:
            axis.axis("off")
    return figure


def embedding_scatter(
    points: Tensor, labels: Tensor, texts: Tensor, text_ids: Sequence[int], names: Sequence[str], *, title: str
) -> Figure:
    """Points in the colours of their classes, and class texts as stars with their names.

    Args:
        points, labels: (L, 2) and (L,) int64.
        texts, text_ids: (T, 2) and the classes of these.
        names: K.
    """
    colors = np.array(palette(len(names)))
    figure = Figure(figsize=(8, 8), layout="constrained")
    axis = figure.subplots()
    axis.scatter(*points.cpu().numpy().T, c=colors[labels.cpu().numpy()], s=14, alpha=0.8, linewidths=0)
    for k in sorted(set(labels.tolist())):
        middle = points[labels == k].median(dim=0).values.tolist()
        axis.annotate(names[k], middle, fontsize=8, ha="center", color=0.6 * colors[k])
    for (x, y), k in zip(texts.tolist(), text_ids, strict=True):
        axis.scatter([x], [y], c=[colors[k]], s=130, marker="*", edgecolors="black", linewidths=0.6)
        axis.annotate(names[k], (x, y), xytext=(5, 5), textcoords="offset points", fontsize=7, style="italic")
    axis.set_title(title, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])
    return figure
