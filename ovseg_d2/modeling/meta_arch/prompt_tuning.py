"""Prompts that a frozen CLIP learns from ground-truth masks, before a host uses them.

The first stage of ZSSeg (arXiv 2112.14757, section 3.3) and FreeSeg (2303.17225, section 3.3) for prompts in texts, and
the last of OVSeg (2210.04150, section 3.3) for prompts in place of masked patches. There are no mask proposals: every
ground-truth mask is a picture with a class. ``MODEL.OVSEG.PROMPTS.WEIGHTS`` takes the checkpoint into a host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor
from torch.nn import functional as F

from ovseg_d2.data.templates import get_templates
from ovseg_d2.modeling.clip.image_prompts import MaskPrompts, build_mask_prompts
from ovseg_d2.modeling.clip.prompts import SentencePrompts, build_sentence_prompts
from ovseg_d2.modeling.layers.boxes import bounding_boxes
from ovseg_d2.modeling.layers.point_sampling import PointSampler
from ovseg_d2.modeling.losses.set_criterion import all_reduced_mean
from ovseg_d2.modeling.mask_classification.crops import expanded_boxes
from ovseg_d2.modeling.mask_classification.mask_encoder import MaskEncoder
from ovseg_d2.modeling.mask_classification.similarity import cosine_logits
from ovseg_d2.modeling.meta_arch.frozen_clip import FrozenCLIP
from ovseg_d2.modeling.meta_arch.open_vocabulary import ClipSegmentor
from ovseg_d2.modeling.text_classifier import TextClassifier, averaged
from ovseg_d2.structures import ImageBatch, MaskProposals, SegmentationTargets, TextClasses, Vocabulary

#: Width over height of training crops, as torchvision's RandomResizedCrop has it.
_ASPECT = (3 / 4, 4 / 3)


@META_ARCH_REGISTRY.register()
class PromptTuning(ClipSegmentor):
    """Cross-entropy of CLIP's cosines between crops of ground-truth masks and the texts of the training classes.

    Crops are filled as those of the evaluation (``CROPS.FILL``). The public ZSSeg sets what is outside of a mask to
    CLIP's mean colour *after* the normalisation in training, so to a colour that its evaluation never shows.
    """

    @configurable
    def __init__(
        self,
        *,
        prompts: SentencePrompts | None,
        mask_prompts: MaskPrompts | None,
        mask_encoder: MaskEncoder,
        masks_per_image: int = 8,
        crop_area: tuple[float, float] = (0.08, 1.0),
        sampler: PointSampler | None = None,
        **shared: Any,
    ) -> None:
        """
        Args:
            prompts: in the texts; None: the texts are fixed.
            mask_prompts: in the crops; None: CLIP sees them as they are.
            mask_encoder: with crops of the style mask_crop.
            masks_per_image: at most so many masks of an image are used in an iteration.
            crop_area: share of a mask's box that a crop shows, from and to.
            sampler: source of the random numbers.
            shared: see :class:`ClipSegmentor`.

        Raises:
            ValueError: nothing to train, or an option out of its range.
        """
        super().__init__(**shared)
        if prompts is None and mask_prompts is None:
            raise ValueError(
                "PromptTuning has nothing to train: MODEL.OVSEG.PROMPTS.KIND is 'none' and "
                "MODEL.OVSEG.CROPS.MASK_PROMPTS is 0; expected a kind of prompts, or a depth above 0"
            )
        if mask_encoder.crops is None or mask_encoder.crops.style != "mask_crop":
            raise ValueError("PromptTuning makes crops of masks; expected MODEL.OVSEG.CROPS.STYLE 'mask_crop'")
        if masks_per_image < 1:
            raise ValueError(f"MODEL.OVSEG.PROMPTS.MASKS_PER_IMAGE is {masks_per_image}; expected at least 1")
        if len(crop_area) != 2 or not 0 < crop_area[0] <= crop_area[1] <= 1:
            raise ValueError(
                f"MODEL.OVSEG.PROMPTS.CROP_AREA is {list(crop_area)}; expected two rising numbers above 0, at most 1"
            )
        self.prompts = prompts
        self.mask_prompts = mask_prompts
        self.mask_encoder = mask_encoder
        self.masks_per_image = masks_per_image
        self.crop_area = (float(crop_area[0]), float(crop_area[1]))
        self.sampler = sampler or PointSampler()
        self.clip.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        ovseg = cfg.MODEL.OVSEG
        shared = cls.shared_from_config(cfg, **FrozenCLIP.clip_options(cfg))
        if ovseg.FROZEN_CLIP.REGION_TEMPLATES:
            classifier = shared["text_classifier"]
            shared["text_classifier"] = TextClassifier(
                tokenizer=classifier.tokenizer,
                templates=get_templates(
                    ovseg.FROZEN_CLIP.REGION_TEMPLATES, key="MODEL.OVSEG.FROZEN_CLIP.REGION_TEMPLATES"
                ),
                trained_vocabulary=classifier.trained_vocabulary,
                cache_dir=classifier.cache_dir,
            )
        return {
            "prompts": build_sentence_prompts(cfg, shared["clip"]),
            "mask_prompts": build_mask_prompts(cfg, shared["clip"]),
            "mask_encoder": MaskEncoder.from_config(cfg, crops=True),
            "masks_per_image": ovseg.PROMPTS.MASKS_PER_IMAGE,
            "crop_area": ovseg.PROMPTS.CROP_AREA,
            "sampler": PointSampler(seed=max(cfg.SEED, 0)),
            **shared,
        }

    def losses(
        self, images: ImageBatch, targets: Sequence[SegmentationTargets], vocabulary: Vocabulary | None
    ) -> dict[str, Tensor]:
        """The mean over masks and tasks. The public FreeSeg draws one task an iteration: the same on average."""
        texts = self.task_texts(self.required(vocabulary))
        embeds, class_ids = self.target_embeds(images, targets)
        count = all_reduced_mean(embeds.new_tensor(float(len(embeds)))).clamp(min=1)
        errors = [
            F.cross_entropy(cosine_logits(embeds, text, self.clip.scale()), class_ids, reduction="sum")
            for text in texts
        ]
        # Without any target the loss has to reach all that is trained, too.
        nothing = sum(0.0 * parameter.sum() for parameter in self.parameters() if parameter.requires_grad)
        return {"loss_prompts": sum(errors) / (len(texts) * count) + nothing}

    def predict(self, images: ImageBatch, vocabulary: Vocabulary) -> MaskProposals:
        """
        Raises:
            ValueError: always, there are no masks.
        """
        raise ValueError(
            "PromptTuning proposes no masks; evaluate a FrozenCLIP with MODEL.OVSEG.PROMPTS.WEIGHTS set to the "
            "checkpoint of this run, and leave DATASETS.TEST empty here"
        )

    def task_texts(self, vocabulary: Vocabulary) -> list[TextClasses]:
        """Embeddings (E, 1, D) for each task; one of the templates' means where the texts are fixed."""
        text = self.text_classifier(self.clip.text, vocabulary, prompts=self.prompts)
        if self.prompts is None:
            return [averaged(text)]
        return [replace(text, embeds=embeds[:, None]) for embeds in text.embeds.unbind(1)]

    def target_embeds(self, images: ImageBatch, targets: Sequence[SegmentationTargets]) -> tuple[Tensor, Tensor]:
        """CLIP's embeddings (V, D) of random crops of some masks of each image, and the masks' classes (V,)."""
        copy = self.mask_encoder.clip_copy(images, resize="none")
        counts = [len(target) for target in targets]
        draws = self.sampler.start(images.image_ids, images.tensor.device)(counts, 3).flatten(1).split(counts)
        embeds, class_ids = [], []
        for i, (target, draw) in enumerate(zip(targets, draws, strict=True)):
            height, width = copy.image_sizes[i]
            masks = target.masks[:, :height, :width]
            order = draw[:, 0].masked_fill(~masks.flatten(1).any(dim=1), math.inf)
            chosen = order.argsort()[: min(self.masks_per_image, int(order.isfinite().sum()))]
            embeds.append(self._crop_embeds(copy.tensor[i, :, :height, :width], masks[chosen], draw[chosen, 1:]))
            class_ids.append(target.class_ids[chosen])
        return torch.cat(embeds), torch.cat(class_ids)

    def _crop_embeds(self, image: Tensor, masks: Tensor, draws: Tensor) -> Tensor:
        """(3, H, W), (V, H, W) bool and (V, 5) in [0, 1) -> (V, D)."""
        crops = self.mask_encoder.crops
        boxes = expanded_boxes(bounding_boxes(masks), crops.expand, (image.shape[1], image.shape[2]))
        return crops.encode_boxes(
            self.clip.visual,
            image,
            masks,
            random_boxes(boxes, masks, draws[:, :4], area=self.crop_area),
            flipped=draws[:, 4] < 0.5,
            mask_prompts=self.mask_prompts,
        )


def random_boxes(boxes: Tensor, masks: Tensor, draws: Tensor, *, area: tuple[float, float]) -> Tensor:
    """Boxes in boxes, drawn as by torchvision's RandomResizedCrop; sides that do not fit are cut.

    Args:
        boxes: (V, 4) x0, y0, x1, y1 in whole pixels, each with pixels of its mask.
        masks: (V, H, W) bool.
        draws: (V, 4) in [0, 1): area, aspect, x and y.
        area: from and to, share of the boxes'.

    Returns:
        (V, 4); the whole box where the draw has no pixel of the mask.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = sides.prod(dim=1) * (area[0] + (area[1] - area[0]) * draws[:, 0])
    lowest, highest = (math.log(aspect) for aspect in _ASPECT)
    aspects = (lowest + (highest - lowest) * draws[:, 1]).exp()
    new_sides = torch.stack([areas * aspects, areas / aspects], dim=1).sqrt().round().clamp(min=1).minimum(sides)
    room = sides - new_sides
    starts = boxes[:, :2] + ((room + 1) * draws[:, 2:]).floor().minimum(room)
    drawn = torch.cat([starts, starts + new_sides], dim=1)
    rows, columns = (torch.arange(length, device=masks.device) for length in masks.shape[1:])
    in_rows = (rows >= drawn[:, 1:2]) & (rows < drawn[:, 3:])
    in_columns = (columns >= drawn[:, :1]) & (columns < drawn[:, 2:3])
    shown = (masks & in_rows[:, :, None] & in_columns[:, None]).flatten(1).any(dim=1)
    return torch.where(shown[:, None], drawn, boxes)
