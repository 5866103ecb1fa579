"""Which figures a model has the pieces for."""

from __future__ import annotations

from torch import nn

from ovseg_d2.inspection.embeddings import has_mask_embeds
from ovseg_d2.inspection.maps import has_dense, has_maps
from ovseg_d2.inspection.masks import has_opinions
from ovseg_d2.modeling.meta_arch.fga_seg import FGASeg


def figures_of(model: nn.Module) -> tuple[str, ...]:
    """Arguments of tools/visualize_model.py's --figure."""
    figures = {
        "cards": has_opinions(model),
        "similarity": has_maps(model),
        "pseudo-masks": isinstance(model, FGASeg),
        "embeddings --points masks": has_mask_embeds(model),
        "embeddings --points pixels": has_dense(model),
    }
    return tuple(name for name, has in figures.items() if has)


def require_figure(model: nn.Module, figure: str) -> None:
    """
    Raises:
        ValueError: the model has no such figure.
    """
    figures = figures_of(model)
    if figure not in figures:
        others = f"it has {', '.join(figures)}" if figures else "nor any other one"
        raise ValueError(f"--figure {figure}: {type(model).__name__}, as configured, has no such figure; {others}")
