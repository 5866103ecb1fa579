"""Mask-to-text contrastive learning (MTA-CLIP, section 3.2, equations 6 to 9)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.clip.clip import MAX_LOGIT_SCALE
from ovseg_d2.modeling.losses.mask_losses import Match
from ovseg_d2.modeling.losses.set_criterion import all_reduced_mean
from ovseg_d2.structures import SegmentationTargets

NEGATIVES = ("mix", "separate")
NORMALISERS = ("queries", "matched")


class MaskTextAlignment(nn.Module):
    """L_sim: a matched mask is nearer to the best text of its class than to the other texts."""

    def __init__(
        self,
        *,
        negatives: str = "mix",
        normaliser: str = "queries",
        temperature: float = 0.07,
        learn_temperature: bool = False,
    ) -> None:
        """
        Args:
            negatives: mix, all texts but the best of the class (MixNeg, equation 8); separate, those of other classes
                (SeparateNeg, equation 9).
            normaliser: queries, the mean over all queries of which most have no class and add nothing; matched, the
                mean over those that have one.
            temperature: cosines are divided by it.
            learn_temperature: its logarithm is trained from there.

        Raises:
            ValueError: an unknown option, or a temperature that is not positive.
        """
        super().__init__()
        for key, value, allowed in (("NEGATIVES", negatives, NEGATIVES), ("SIM_NORM", normaliser, NORMALISERS)):
            if value not in allowed:
                raise ValueError(f"MODEL.OVSEG.MTA_CLIP.{key} is {value!r}; allowed are {', '.join(allowed)}")
        if temperature <= 0:
            raise ValueError(f"MODEL.OVSEG.MTA_CLIP.TEMPERATURE is {temperature}; expected a positive number")
        self.negatives, self.normaliser = negatives, normaliser
        scale = torch.tensor(math.log(1 / temperature))
        if learn_temperature:
            self.logit_scale = nn.Parameter(scale)
        else:
            self.register_buffer("logit_scale", scale, persistent=False)

    def similarity(self, mask_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """S of equation 6, as cosines over the temperature, in float32 under autocast.

        Args:
            mask_embeds: (N, Q, D) of any length.
            text_embeds: (N, P, K, D) of any length: P contexts.

        Returns:
            (N, Q, P, K).
        """
        with torch.autocast(device_type=mask_embeds.device.type, enabled=False):
            masks, texts = (F.normalize(embeds.float(), dim=-1) for embeds in (mask_embeds, text_embeds))
            scale = self.logit_scale.float().exp()
            if self.logit_scale.requires_grad:
                scale = scale.clamp(max=MAX_LOGIT_SCALE)
            return (scale * masks @ texts.flatten(1, 2).transpose(1, 2)).unflatten(-1, texts.shape[1:3])

    def forward(
        self,
        mask_embeds: Tensor,
        text_embeds: Tensor,
        targets: Sequence[SegmentationTargets],
        matches: Sequence[Match],
    ) -> Tensor:
        """
        Args:
            mask_embeds, text_embeds: see :meth:`similarity`; m' and t' of equation 5.
            targets: of the N images.
            matches: of each image, queries and their targets.

        Returns:
            Scalar, not weighted; zero, and connected to both embeddings, without any match.
        """
        counts = torch.tensor([len(queries) for queries, _ in matches])
        images = torch.arange(len(counts)).repeat_interleave(counts).to(mask_embeds.device)
        queries = torch.cat([queries for queries, _ in matches])
        class_ids = torch.cat([t.class_ids[matched] for t, (_, matched) in zip(targets, matches, strict=True)])
        logits = self.similarity(mask_embeds, text_embeds)[images, queries]
        total = self.query_losses(logits, class_ids).sum()
        if self.normaliser == "queries":
            return total / (mask_embeds.shape[0] * mask_embeds.shape[1])
        return total / all_reduced_mean(total.new_tensor(float(len(queries)))).clamp(min=1)

    def query_losses(self, logits: Tensor, class_ids: Tensor) -> Tensor:
        """(R, P, K) similarities of matched queries, and their classes (R,) -> (R,)."""
        best = best_contexts(logits, class_ids)
        rows = torch.arange(len(logits), device=logits.device)
        positive = logits[rows, best, class_ids]
        if self.negatives == "separate":
            own = torch.zeros_like(logits, dtype=torch.bool)
            own[rows, :, class_ids] = True
            own[rows, best, class_ids] = False
            logits = logits.masked_fill(own, float("-inf"))
        return logits.flatten(1).logsumexp(dim=1) - positive


def best_contexts(logits: Tensor, class_ids: Tensor) -> Tensor:
    """k-tilde: (R, P, K) similarities and classes (R,) -> (R,) the context in which the class's text is nearest."""
    return logits[torch.arange(len(logits), device=logits.device), :, class_ids].argmax(dim=1)
