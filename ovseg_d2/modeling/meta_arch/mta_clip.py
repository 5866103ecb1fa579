"""MTA-CLIP: Mask2Former whose decoder takes CLIP's texts as queries, and aligns them with the masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ovseg_d2.data.templates import get_templates
from ovseg_d2.modeling.clip.build import build_clip, clip_tokenizer
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.clip.name_tokenizer import NameTokenizer, first_names
from ovseg_d2.modeling.clip.prompts import LearnableContexts
from ovseg_d2.modeling.losses.alignment import MaskTextAlignment
from ovseg_d2.modeling.losses.set_criterion import SetCriterion
from ovseg_d2.modeling.mask_classification.mask_text_projection import MaskTextProjection, TextQueries
from ovseg_d2.modeling.meta_arch.mask2former import Mask2Former
from ovseg_d2.modeling.proposals import build_mask_proposals
from ovseg_d2.modeling.text_classifier import TextClassifier, averaged
from ovseg_d2.structures import ImageBatch, MaskProposals, SegmentationTargets, TextClasses, Vocabulary

SCORES = ("head", "similarity")


@META_ARCH_REGISTRY.register()
class MTACLIP(Mask2Former):
    """Mask2Former with a frozen text tower, learned contexts and mask-text alignment, each if it is asked for.

    Without any of them it is Mask2Former, with the same parameters.
    """

    @configurable
    def __init__(
        self,
        *,
        clip: Clip | None = None,
        text_classifier: TextClassifier | None = None,
        context_prompts: LearnableContexts | None = None,
        text_queries: TextQueries | None = None,
        projections: Sequence[MaskTextProjection] = (),
        alignment: MaskTextAlignment | None = None,
        alignment_weight: float = 1.0,
        score: str = "head",
        **shared: Any,
    ) -> None:
        """
        Args:
            clip: the text tower alone; None if nothing needs texts.
            text_classifier: vocabularies -> embeddings; for ``text_queries`` of the length that the tower gives them.
            context_prompts: learned contexts before the names; None: fixed texts.
            text_queries: texts -> queries of the decoder; None: it has no texts among them.
            projections: back to CLIP's space, one for all decoder layers or one for each.
            alignment: the contrastive loss (MTCL) of each decoder layer; None: off.
            alignment_weight: lambda_3 of equation 10.
            score: what classifies the masks: the generator's "head", or the "similarity" with the texts.
            shared: see :class:`Mask2Former`.

        Raises:
            ValueError: a score that does not exist, or needs the alignment.
        """
        super().__init__(**shared)
        if score not in SCORES:
            raise ValueError(f"MODEL.OVSEG.MTA_CLIP.SCORE is {score!r}; allowed are {', '.join(SCORES)}")
        if score == "similarity" and alignment is None:
            raise ValueError(
                "MODEL.OVSEG.MTA_CLIP.SCORE is 'similarity', which needs masks aligned with texts; expected "
                "TEXT_ENHANCED True and a LOSS_WEIGHT above 0, or 'head'"
            )
        self.clip = clip
        self.text_classifier = text_classifier
        self.context_prompts = context_prompts
        self.text_queries = text_queries
        self.projections = nn.ModuleList(projections)
        self.alignment = alignment
        self.alignment_weight = alignment_weight
        self.score = score

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        _check_options(cfg)
        mta = cfg.MODEL.OVSEG.MTA_CLIP
        clip = None
        if mta.TEXT_ENHANCED or cfg.MODEL.OVSEG.PROPOSALS.CLASS_HEAD in ("text", "embed"):
            # The same seed gives the same generator, with texts and without.
            with torch.random.fork_rng(devices=[]):
                clip = build_clip(cfg.MODEL.OVSEG.CLIP.NAME, with_visual=False).requires_grad_(False)
        parts = {
            "proposals": build_mask_proposals(cfg, clip),
            "criterion": SetCriterion.from_config(cfg),
            "score": mta.SCORE,
            **cls.shared_from_config(cfg),
        }
        if clip is not None:
            parts |= {"clip": clip, "text_classifier": build_text_classifier(cfg, clip)}
        return {**parts, **cls._text_parts(cfg, clip)} if mta.TEXT_ENHANCED else parts

    @staticmethod
    def _text_parts(cfg: CfgNode, clip: Clip) -> dict[str, Any]:
        """What ``MTA_CLIP.TEXT_ENHANCED`` adds to the model."""
        mta, prop = cfg.MODEL.OVSEG.MTA_CLIP, cfg.MODEL.OVSEG.PROPOSALS
        parts: dict[str, Any] = {
            "text_queries": TextQueries(embed_dim=clip.embed_dim, dim=prop.HIDDEN_DIM, norm=mta.TEXT_INPUT_NORM)
        }
        if mta.LEARN_CONTEXTS:
            parts["context_prompts"] = LearnableContexts(
                num_contexts=mta.NUM_CONTEXTS, length=mta.CONTEXT_LENGTH, dim=clip.text.width, std=mta.CONTEXT_INIT_STD
            )
        if mta.LOSS_WEIGHT > 0:
            own = mta.PER_LAYER_PROJ and cfg.MODEL.OVSEG.LOSS.DEEP_SUPERVISION
            parts["projections"] = [
                MaskTextProjection(dim=prop.HIDDEN_DIM, embed_dim=clip.embed_dim)
                for _ in range(prop.DEC_LAYERS if own else 1)
            ]
            parts["alignment"] = MaskTextAlignment(
                negatives=mta.NEGATIVES,
                normaliser=mta.SIM_NORM,
                temperature=mta.TEMPERATURE,
                learn_temperature=mta.LEARN_TEMPERATURE,
            )
            parts["alignment_weight"] = mta.LOSS_WEIGHT
        return parts

    def text_embeds(self, vocabulary: Vocabulary) -> Tensor:
        """t^0 of each class's name (P, K, D), P contexts; with gradient in training if the contexts are learned."""
        embeds = self._text(vocabulary).embeds
        if self.context_prompts is None:
            embeds = embeds.mean(dim=1, keepdim=True)
        return embeds.transpose(0, 1)

    def propose(self, images: ImageBatch, vocabulary: Vocabulary | None) -> tuple[MaskProposals, Tensor | None]:
        """The generator's proposals, and the texts (P, K, D) that it had among its queries."""
        if self.clip is None:
            return self.proposals(images), None
        if self.text_queries is None:
            return self.proposals(images, text=averaged(self._text(self.required(vocabulary)))), None
        embeds = self.text_embeds(self.required(vocabulary))
        return self.proposals(images, text_queries=self.text_queries(embeds.flatten(0, 1))), embeds

    def losses(
        self, images: ImageBatch, targets: Sequence[SegmentationTargets], vocabulary: Vocabulary | None
    ) -> dict[str, Tensor]:
        """Those of Mask2Former and, after each decoder layer, ``loss_align``."""
        proposals, text_embeds = self.propose(images, vocabulary)
        losses, matches = self.criterion.losses_and_matches(proposals, targets, images.image_ids)
        if self.alignment is None:
            return losses
        # The first of `aux` are queries that no layer has seen.
        names = [*(f"loss_align_{i}" for i in range(len(matches) - 1)), "loss_align"]
        layers = [*proposals.aux, proposals][-len(matches) :]
        for i, (name, layer, layer_matches) in enumerate(zip(names, layers, matches, strict=True)):
            if layer.text_queries is not None:
                masks, texts = self.projected(layer, text_embeds, i - 1)
                losses[name] = self.alignment_weight * self.alignment(masks, texts, targets, layer_matches)
        return losses

    def projected(self, layer: MaskProposals, text_embeds: Tensor, index: int = -1) -> tuple[Tensor, Tensor]:
        """m' (N, Q, D) and t' (N, P, K, D) of a decoder layer, by its index or, if all share one, the only projection.

        Args:
            text_embeds: (P, K, D).
        """
        projection = self.projections[index if len(self.projections) > 1 else 0]
        return projection(layer.query_embeds, layer.text_queries, text_embeds)

    def predict(self, images: ImageBatch, vocabulary: Vocabulary) -> MaskProposals:
        """
        Raises:
            ValueError: the head's classes score the masks, and ``vocabulary`` has another number of classes.
        """
        matched_with_texts = self.clip is not None and self.text_queries is None
        if self.score == "head" and not matched_with_texts:
            self.check_classes(vocabulary)
        proposals, text_embeds = self.propose(images, vocabulary)
        if self.score == "similarity":
            proposals.class_probs = self.similarity_probs(proposals, text_embeds)
        return proposals

    def similarity_probs(self, proposals: MaskProposals, text_embeds: Tensor) -> Tensor:
        """Class probabilities (N, Q, K + 1) of any vocabulary: a softmax over the similarities with each class's
        nearest text, times the probability that the mask is an object at all."""
        similarity = self.alignment.similarity(*self.projected(proposals, text_embeds))
        no_object = proposals.class_logits.float().softmax(dim=-1)[..., -1:]
        return torch.cat([(1 - no_object) * similarity.amax(dim=2).softmax(dim=-1), no_object], dim=-1)

    def _text(self, vocabulary: Vocabulary) -> TextClasses:
        """One entry a class, embeds (K, P, D): a class is one text here, whatever synonyms its dataset lists."""
        return self.text_classifier(self.clip.text, first_names(vocabulary), prompts=self.context_prompts)


def _check_options(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: another kind of generator or class head, or texts that nothing would train.
    """
    mta, prop = cfg.MODEL.OVSEG.MTA_CLIP, cfg.MODEL.OVSEG.PROPOSALS
    if prop.NAME != "Mask2FormerProposals":
        raise ValueError(
            f"MODEL.OVSEG.PROPOSALS.NAME is {prop.NAME!r}, but MODEL.META_ARCHITECTURE is 'MTACLIP'; expected "
            "'Mask2FormerProposals'"
        )
    if mta.TEXT_ENHANCED and prop.CLASS_HEAD != "linear":
        raise ValueError(
            f"MODEL.OVSEG.PROPOSALS.CLASS_HEAD is {prop.CLASS_HEAD!r}, but MODEL.OVSEG.MTA_CLIP.TEXT_ENHANCED is True; "
            "expected 'linear'"
        )
    if mta.TEXT_ENHANCED and mta.SEPARATE_ATTENTION and mta.LOSS_WEIGHT <= 0:
        raise ValueError(
            f"MODEL.OVSEG.MTA_CLIP.SEPARATE_ATTENTION is True and LOSS_WEIGHT {mta.LOSS_WEIGHT}: nothing would train "
            "the texts, expected a LOSS_WEIGHT above 0"
        )


def build_text_classifier(cfg: CfgNode, clip: Clip) -> TextClassifier:
    """Names alone where contexts are learned, sentences of ``MODEL.OVSEG.TEXT.TEMPLATES`` elsewhere.

    Raises:
        ValueError: no context, or no place for it beside a name.
    """
    ovseg = cfg.MODEL.OVSEG
    mta, tokenizer, templates = ovseg.MTA_CLIP, clip_tokenizer(ovseg.CLIP.NAME), get_templates(ovseg.TEXT.TEMPLATES)
    if mta.TEXT_ENHANCED and mta.LEARN_CONTEXTS:
        if mta.NUM_CONTEXTS < 1:
            raise ValueError(f"MODEL.OVSEG.MTA_CLIP.NUM_CONTEXTS is {mta.NUM_CONTEXTS}; expected at least 1")
        templates = ("{}",)
        tokenizer = NameTokenizer.beside_context(
            tokenizer,
            section="MODEL.OVSEG.MTA_CLIP",
            text_length=mta.TEXT_LENGTH,
            context_length=mta.CONTEXT_LENGTH,
            clip_name=ovseg.CLIP.NAME,
            places=clip.text.context_length,
        )
    else:
        places = clip.text.context_length
        tokenizer = NameTokenizer(tokenizer, length=places, limit=f"{ovseg.CLIP.NAME} has {places} places")
    return TextClassifier(
        tokenizer=tokenizer, templates=templates, cache_dir=ovseg.TEXT.CACHE_DIR, normalise=not mta.TEXT_ENHANCED
    )
