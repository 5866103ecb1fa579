"""CAT-Seg's and FGA-seg's class maps: similarities of pixels and texts, their aggregation, the decoder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn

from ovseg_d2.modeling.pixel_classification.class_rows import ClassRows, in_chunks
from ovseg_d2.modeling.pixel_classification.cost_aggregation import CostAggregation, CostEmbedding
from ovseg_d2.modeling.pixel_classification.cost_decoder import CostDecoder, chosen_rows, head_logits
from ovseg_d2.modeling.pixel_classification.pixel_text_alignment import GlobalLocalSimilarity


@dataclass
class CostMaps:
    """What a :class:`CostHead` predicts.

    Attributes:
        logits: (N, E, 4h, 4w); ``RULED_OUT_LOGIT`` for classes that were ruled out.
        aux_logits: of the auxiliary heads, in training or where classes are ruled out: (N, E, h, w) before the
            aggregation, the same before the decoder's first stage, (N, E, 2h, 2w) before its second.
        attended: (N, E) bool, which classes the aggregation had a place for.
        kept: (N, E) bool, which of them the fast path left.
    """

    logits: Tensor
    attended: Tensor
    kept: Tensor
    aux_logits: list[Tensor] = field(default_factory=list)


class CostHead(nn.Module):
    """Logits of every class at every pixel. Without a local similarity, it is CAT-Seg's."""

    def __init__(
        self,
        *,
        similarity: GlobalLocalSimilarity,
        embedding: CostEmbedding,
        aggregation: CostAggregation,
        decoder: CostDecoder,
        max_classes: int = 256,
        top_k: int = 0,
    ) -> None:
        """
        Args:
            similarity: of pixels and texts.
            embedding: of similarities.
            aggregation: of the cost volume.
            decoder: of the aggregated one; where it has auxiliary heads, so has this.
            max_classes: how many classes an image's aggregation takes, those with the largest global similarity at any
                of its pixels, as in the public code; 0: every class.
            top_k: outside of training, classes that are among the best ``top_k`` of no pixel of an image, as auxiliary
                heads see it, are ruled out before the aggregation and before each stage of the decoder; 0: none.

        Raises:
            ValueError: a negative ``max_classes`` or ``top_k``, or a ``top_k`` without auxiliary heads.
        """
        super().__init__()
        for name, value in (("MAX_CLASSES", max_classes), ("TOP_K", top_k)):
            if value < 0:
                raise ValueError(f"MODEL.OVSEG.FGA_SEG.{name} is {value}; expected 0 or more")
        if top_k and decoder.aux_heads is None:
            raise ValueError(f"MODEL.OVSEG.FGA_SEG.TOP_K is {top_k}, but there are no auxiliary heads to choose by")
        self.similarity = similarity
        self.embedding = embedding
        self.aggregation = aggregation
        self.decoder = decoder
        width = embedding.global_conv.out_channels
        self.aux_head = None if decoder.aux_heads is None else nn.Conv2d(width, 1, 3, padding=1)
        self.max_classes = max_classes
        self.top_k = top_k

    def forward(self, dense: Tensor, text: Tensor, features: Sequence[Tensor]) -> CostMaps:
        """
        Args:
            dense: (N, D, h, w) CLIP's features of the positions.
            text: (N, E, P, D) aligned texts, or (1, E, P, D) where all images have the same.
            features: the maps (N, C', 2h, 2w) and (N, C'', 4h, 4w) that guide the decoder.
        """
        text = text.expand(len(dense), -1, -1, -1)
        global_similarity = self.similarity.global_similarity(dense, text)  # (N, P, E, h, w)
        class_ids = self.attending_classes(global_similarity)
        attended = torch.zeros(text.shape[:2], dtype=torch.bool, device=dense.device).scatter_(1, class_ids, True)
        rows = ClassRows.of_mask(attended)
        if rows.is_full:
            local = self.similarity.local_similarity(dense, text)
        else:
            chosen_text = text.gather(1, class_ids[:, :, None, None].expand(-1, -1, *text.shape[2:]))
            local = self.similarity.local_similarity(dense, chosen_text)
        text = rows.of_entries(text)  # (R, P, D)
        similarities = [rows.of_entries(global_similarity.transpose(1, 2))]
        if local is not None:
            similarities.append(local.flatten(0, 1))
        top_k = 0 if self.training else self.top_k
        aux = []
        if top_k:
            # The features of survivors are computed again, so that those of all classes are never there together.
            logits = in_chunks(self._scores, rows, *similarities, size=self.embedding.chunk_size)
            aux.append(rows.to_entries(logits))
            chosen = chosen_rows(rows, logits, top_k)
            rows, text, similarities = rows.select(chosen), text[chosen], [x[chosen] for x in similarities]
        x, local = self.embedding(rows, *similarities)
        if self.training and self.aux_head is not None:
            aux.append(rows.to_entries(head_logits(self.aux_head, x)))
        x = self.aggregation(rows, x, dense, text)
        rows, logits, later_aux = self.decoder(rows, x, local, features, with_aux=bool(aux), top_k=top_k)
        return CostMaps(
            logits=rows.to_entries(logits), attended=attended, kept=rows.kept(), aux_logits=[*aux, *later_aux]
        )

    def _scores(self, rows: ClassRows, *similarities: Tensor) -> Tensor:
        return head_logits(self.aux_head, self.embedding(rows, *similarities)[0])

    def attending_classes(self, global_similarity: Tensor) -> Tensor:
        """(N, P, E, h, w) -> ids (N, T) of the classes that the aggregation takes, ascending."""
        num_images, _, num_classes, _, _ = global_similarity.shape
        everything = not self.max_classes or num_classes <= self.max_classes
        log_first_n(
            logging.INFO,
            f"Cost aggregation of {num_classes} classes: "
            + ("all attend" if everything else f"the {self.max_classes} most similar ones of an image attend, the ")
            + ("" if everything else "others get no pixel of it")
            + f" (MODEL.OVSEG.FGA_SEG.MAX_CLASSES {self.max_classes})",
            key="message",
            name=__name__,
        )
        if everything:
            return torch.arange(num_classes, device=global_similarity.device).expand(num_images, -1)
        best = global_similarity.transpose(1, 2).flatten(2).amax(dim=2)
        return best.topk(self.max_classes, dim=1).indices.sort(dim=1).values
