"""CLIP's classifier: scaled cosines of embeddings and class texts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ovseg_d2.modeling.text_classifier import class_logits
from ovseg_d2.structures import TextClasses


def cosine_logits(
    embeds: Tensor,
    text: TextClasses,
    scale: Tensor,
    *,
    void_embed: Tensor | None = None,
    normalise_void: bool = True,
) -> Tensor:
    """Cosines times ``scale``, of each class's most similar entry; in float32 under autocast.

    Args:
        embeds: (..., D), of any length.
        text: embeds (E, 1, D): one prompt an entry, see :func:`text_classifier.averaged`.
        scale: scalar.
        void_embed: (1, D), the row of "no object", of any length; None for no such column.
        normalise_void: False if the length of ``void_embed`` counts (ZegFormer): its logit is then no cosine.

    Returns:
        (..., K), or (..., K + 1) with "no object" last.
    """
    assert text.embeds.shape[1] == 1, f"expected one prompt an entry, got {text.embeds.shape[1]}"
    with torch.autocast(device_type=embeds.device.type, enabled=False):
        rows, class_ids, num_classes = text.embeds[:, 0].float(), text.class_ids, len(text)
        if void_embed is not None:
            void_row = void_embed.float()
            rows = torch.cat([rows, F.normalize(void_row, dim=-1) if normalise_void else void_row])
            class_ids = torch.cat([class_ids, class_ids.new_tensor([num_classes])])
            num_classes += 1
        entry_logits = scale.float() * F.normalize(embeds.float(), dim=-1) @ rows.T
        return class_logits(entry_logits, class_ids, num_classes)
