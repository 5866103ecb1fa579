"""MaskCLIP++ (arXiv 2412.11464): CLIP tuned on ground-truth masks, to name the masks of any generator."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.logger import log_every_n_seconds
from torch import Tensor, nn

from ovseg_d2.modeling.clip.trainable import apply_policy
from ovseg_d2.modeling.inference.mask_inference import MaskInference
from ovseg_d2.modeling.layers.step_counter import StepCounter
from ovseg_d2.modeling.losses.mask_classification import MaskClassificationLoss
from ovseg_d2.modeling.mask_classification.build_similarity import build_similarity
from ovseg_d2.modeling.mask_classification.generator_classes import GeneratorClasses
from ovseg_d2.modeling.mask_classification.mask_encoder import MaskEncoder, divisor_of
from ovseg_d2.modeling.mask_classification.parameterized_similarity import CosineSimilarity
from ovseg_d2.modeling.mask_classification.region_priors import (
    PRIORS,
    boxes_of,
    labelled_pixels,
    matched_masks,
    on_frame,
    regions_on_grid,
)
from ovseg_d2.modeling.meta_arch.maskclippp_options import (
    require_untuned_features,
    scales_cosines,
    similarity_context,
    visual_options,
)
from ovseg_d2.modeling.meta_arch.open_vocabulary import ClipSegmentor
from ovseg_d2.modeling.proposals import build_mask_proposals, has_classes
from ovseg_d2.modeling.proposals.generator_copy import GeneratorCopy
from ovseg_d2.modeling.text_classifier import averaged
from ovseg_d2.structures import (
    ClipFeatures,
    ImageBatch,
    MaskProposals,
    SegmentationTargets,
    TextClasses,
    Vocabulary,
)


@META_ARCH_REGISTRY.register()
class MaskCLIPpp(ClipSegmentor):
    """Training classifies the masks of the ground truth, and runs no generator (section 3.2). In evaluation the masks
    are a generator's, whose own classification may have a say (equation 4)."""

    @configurable
    def __init__(
        self,
        *,
        similarity: nn.Module,
        proposals: nn.Module,
        mask_encoder: MaskEncoder,
        class_loss: MaskClassificationLoss,
        generator_classes: GeneratorClasses | None = None,
        generator_copy: GeneratorCopy | None = None,
        prior: str = "masks",
        ignore_empty: bool = True,
        use_logit_scale: bool = True,
        context: str = "none",
        similarity_at_test: bool = True,
        seed: int = 0,
        **shared: Any,
    ) -> None:
        """
        Args:
            similarity: masks and texts -> logits.
            proposals: the masks of an evaluation.
            mask_encoder: masks -> CLIP's embeddings of them, in one pass over the image.
            generator_classes: what the generator says of classes, and the ensemble; None: CLIP alone names masks.
            generator_copy: the images as the generator gets them; None: as they are loaded.
            prior: what training embeds, one of :data:`region_priors.PRIORS`.
            ignore_empty: masks that vanish on CLIP's grid are left out of the loss.
            use_logit_scale: the similarity gets CLIP's scale.
            context: what the similarity sees of the image: "dense" embeddings of all positions, "image", its global
                one, or "none".
            similarity_at_test: False: CLIP's own cosines in evaluation (Table 11).
            seed: of the synonyms that stand for their classes in training.
            shared: see :class:`ClipSegmentor`.

        Raises:
            ValueError: another prior.
        """
        super().__init__(**shared)
        if prior not in PRIORS:
            raise ValueError(f"MODEL.OVSEG.MASKCLIPPP.PRIOR is {prior!r}; allowed are {', '.join(PRIORS)}")
        self.similarity = similarity
        self.proposals = proposals.requires_grad_(False)
        self.mask_encoder = mask_encoder
        self.class_loss = class_loss
        self.generator_classes = generator_classes or GeneratorClasses()
        self._generator_copy = generator_copy or GeneratorCopy()
        self.prior, self.ignore_empty = prior, ignore_empty
        self.use_logit_scale, self.context = use_logit_scale, context
        self.similarity_at_test = similarity_at_test
        self.seed, self.step = seed, StepCounter()
        self.num_vanished_masks = 0
        self.num_images_without_masks = 0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        options = cfg.MODEL.OVSEG.MASKCLIPPP
        shared = cls.shared_from_config(cfg, **visual_options(cfg))
        shared["inference"] = MaskInference.from_config(cfg, resize_probs=True)
        apply_policy(shared["clip"].text, cfg.MODEL.OVSEG.TEXT.TRAINABLE)
        proposals = build_mask_proposals(cfg, shared["clip"])
        require_untuned_features(cfg, proposals)
        return {
            "similarity": build_similarity(
                cfg, dim=shared["clip"].visual.embed_dim, num_prompts=len(shared["text_classifier"].templates)
            ),
            "proposals": proposals,
            "generator_classes": GeneratorClasses.from_config(cfg, has_classes=has_classes(proposals)),
            "generator_copy": GeneratorCopy.from_config(cfg, proposals),
            "mask_encoder": MaskEncoder.from_config(cfg, crops=False),
            "class_loss": MaskClassificationLoss(
                kind=options.LOSS, balanced=options.BALANCED, temperature=options.TEMPERATURE
            ),
            "prior": options.PRIOR,
            "ignore_empty": options.IGNORE_EMPTY,
            "use_logit_scale": scales_cosines(cfg),
            "context": similarity_context(cfg),
            "similarity_at_test": options.SIMILARITY_AT_TEST,
            "seed": max(cfg.SEED, 0),
            **shared,
        }

    def fill_missing(self, given: set[str]) -> set[str]:
        """Leave alpha, which no pretrained CLIP has, at ``LOG_ALPHA``.

        Args:
            given: names of the tensors that files gave.

        Returns:
            Names of the tensors that need no file.
        """
        name = "clip.visual.mask_logit_scale"
        return {name} & set(self.state_dict()) - given

    def losses(
        self, images: ImageBatch, targets: Sequence[SegmentationTargets], vocabulary: Vocabulary | None
    ) -> dict[str, Tensor]:
        """The loss of classification. Masks without area are counted, and left out if ``ignore_empty``."""
        vocabulary = self.required(vocabulary)
        text = self.training_text(vocabulary)
        targets = self.regions(images, targets, vocabulary)
        if not any(len(target) for target in targets):
            self._count(0, len(targets))
            return {"loss_mask_class": self._connected_zero()}
        copy = self.mask_encoder.clip_copy(images, resize="none", divisor=divisor_of(self.clip.visual))
        features = self.clip.visual(copy.tensor, masks_only=self.context == "none" and self.prior != "pixels")
        regions = regions_on_grid(on_frame(targets, copy.padded_size), features.grid)
        self._count(int((regions.valid & ~regions.visible).sum()), sum(not len(target) for target in targets))
        if self.prior == "pixels":
            embeds = features.dense.flatten(2).transpose(1, 2)
            class_ids, used = labelled_pixels(regions)
        else:
            embeds = self.clip.visual.encode_masks(features, regions.masks)
            class_ids, used = regions.class_ids, regions.valid
            if self.ignore_empty:
                used = used & regions.visible
        chosen = used.nonzero(as_tuple=True)
        if not len(chosen[0]):
            return {"loss_mask_class": self._connected_zero()}
        logits = self.similarity_logits(embeds, text, features)
        return {"loss_mask_class": self.class_loss(logits[chosen], class_ids[chosen], chosen[0])}

    def regions(
        self, images: ImageBatch, targets: Sequence[SegmentationTargets], vocabulary: Vocabulary
    ) -> Sequence[SegmentationTargets]:
        """What stands for the ground truth's masks in training (Table 2)."""
        if self.prior == "boxes":
            return boxes_of(targets)
        if self.prior == "matched":
            with torch.no_grad():
                frame = self.generator_copy(images)
                proposals, mask_probs = self.generated(frame, vocabulary)
                mask_probs = self.mask_encoder.to_frame(mask_probs, frame, images)
            return matched_masks(targets, mask_probs, proposals.valid)
        return targets

    def training_text(self, vocabulary: Vocabulary) -> TextClasses:
        """Embeddings (K, P, D): one synonym of each class, drawn anew in each iteration."""
        draw = random.Random(f"{self.seed}/{self.step()}").randrange
        choices = [draw(len(synonyms)) for synonyms in vocabulary.synonyms]
        if any(parameter.requires_grad for parameter in self.clip.text.parameters()):
            chosen = tuple((synonyms[i],) for synonyms, i in zip(vocabulary.synonyms, choices, strict=True))
            return self.text(replace(vocabulary, synonyms=chosen))
        text = self.text(vocabulary)
        first = torch.searchsorted(text.class_ids, torch.arange(len(text), device=text.class_ids.device))
        rows = first + torch.tensor(choices, device=first.device)
        return replace(text, embeds=text.embeds[rows], class_ids=text.class_ids[rows])

    def similarity_logits(self, mask_embeds: Tensor, text: TextClasses, features: ClipFeatures) -> Tensor:
        """(N, Q, D) -> (N, Q, K), with the similarity that is trained."""
        dense = features.dense
        if self.context == "image":
            dense = features.image_embeds[..., None, None]
        scale = self.clip.scale() if self.use_logit_scale else 1.0
        with torch.autocast(device_type=mask_embeds.device.type, enabled=False):
            return self.similarity(
                mask_embeds.float(), text, scale=scale, dense=None if dense is None else dense.float()
            )

    def generator_copy(self, images: ImageBatch) -> ImageBatch:
        return self._generator_copy(images)

    def generated(self, frame: ImageBatch, vocabulary: Vocabulary) -> tuple[MaskProposals, Tensor]:
        """The generator's proposals and their masks, probabilities (N, Q, H, W) on the padded images.

        Args:
            frame: the images as the generator gets them.
        """
        proposals = self.propose(self.proposals, frame, averaged(self.text(vocabulary)), vocabulary)
        # Probabilities are resized, not logits as in FC-CLIP, as the public code does it.
        return proposals, self.mask_encoder.resized(proposals.mask_logits.float().sigmoid(), frame)

    def infer(
        self, images: ImageBatch, batched_inputs: Sequence[dict[str, Any]], vocabulary: Vocabulary
    ) -> list[dict[str, Any]]:
        """As in the base class, from masks at the generator's size."""
        frame = self.generator_copy(images)
        inputs = [{"height": h, "width": w, **x} for x, (h, w) in zip(batched_inputs, images.image_sizes, strict=True)]
        return self.results(self.classified(images, frame, vocabulary), frame, inputs, vocabulary, self.inference)

    def predict(self, images: ImageBatch, vocabulary: Vocabulary) -> MaskProposals:
        """Masks (N, Q, H, W) on the padded :meth:`generator_copy` of the images."""
        return self.classified(images, self.generator_copy(images), vocabulary)

    def classified(self, images: ImageBatch, frame: ImageBatch, vocabulary: Vocabulary) -> MaskProposals:
        """The generator's masks on the padded ``frame``, named by CLIP, which sees ``images`` at a size of its own."""
        proposals, mask_probs = self.generated(frame, vocabulary)
        clip_logits = self.clip_logits(images, frame, mask_probs, self.text(vocabulary))
        return replace(
            proposals,
            mask_logits=mask_probs.logit(eps=1e-6),
            class_logits=self.generator_classes.combine(clip_logits, proposals, vocabulary),
        )

    def results(
        self,
        proposals: MaskProposals,
        images: ImageBatch,
        batched_inputs: Sequence[dict[str, Any]],
        vocabulary: Vocabulary,
        inference: MaskInference,
    ) -> list[dict[str, Any]]:
        """As in the base class; for mask accuracy ``mask_class_probs`` (Q, K) of the masks that came with an image."""
        results = super().results(proposals, images, batched_inputs, vocabulary, inference)
        if "mask_accuracy" in inference.tasks:
            class_probs = proposals.class_logits[..., :-1].softmax(-1)
            for result, x, probs in zip(results, batched_inputs, class_probs, strict=True):
                result["mask_class_probs"] = probs[: len(x["proposals"])]
        return results

    def clip_logits(self, images: ImageBatch, frame: ImageBatch, mask_probs: Tensor, text: TextClasses) -> Tensor:
        """CLIP's classification (N, Q, K) of masks (N, Q, H, W) on the padded ``frame`` of the images."""
        copy = self.mask_encoder.clip_copy(images, divisor=divisor_of(self.clip.visual))
        tuned = self.similarity_at_test
        features = self.clip.visual(copy.tensor, masks_only=not tuned or self.context == "none")
        embeds = self.clip.visual.encode_masks(features, self.mask_encoder.to_frame(mask_probs, frame, copy))
        if tuned:
            return self.similarity_logits(embeds, text, features)
        return CosineSimilarity()(embeds, text, scale=self.clip.scale())

    def _connected_zero(self) -> Tensor:
        """Zero, with a gradient of zero for every trainable parameter: other processes wait for it."""
        return sum(0.0 * parameter.sum() for parameter in self.parameters() if parameter.requires_grad)

    def _count(self, num_vanished: int, num_without: int) -> None:
        """Report, once a minute, what training has not learned from, or from nothing but a constant."""
        self.num_vanished_masks += num_vanished
        self.num_images_without_masks += num_without
        if num_vanished or num_without:
            log_every_n_seconds(
                logging.WARNING,
                f"so far {self.num_vanished_masks} masks had no area on CLIP's grid, and "
                f"{'were left out' if self.ignore_empty else 'count as the constant that CLIP makes of nothing'}; "
                f"{self.num_images_without_masks} images had no masks",
                n=60,
                name=__name__,
            )
