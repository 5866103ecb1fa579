"""FGA-seg (arXiv 2501.00877) and its baseline CAT-Seg (arXiv 2303.11797): similarities of CLIP's dense features and
texts are a cost volume, which is aggregated over pixels and over classes, and decoded to class maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.clip.architectures import tower_kind
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.clip.image_prompts import PromptTokens
from ovseg_d2.modeling.clip.name_tokenizer import first_names
from ovseg_d2.modeling.clip.prompts import DeepTextPrompts
from ovseg_d2.modeling.clip.trainable import apply_policy
from ovseg_d2.modeling.losses.pixel_losses import (
    pixel_binary_cross_entropy,
    pixel_cross_entropy,
    pixel_labels,
    text_pixel_alignment_loss,
)
from ovseg_d2.modeling.mask_classification.mask_encoder import PADDED_SQUARE, MaskEncoder, divisor_of
from ovseg_d2.modeling.meta_arch.score_segmentor import ScoreSegmentor
from ovseg_d2.modeling.pixel_classification.build import build_cost_head
from ovseg_d2.modeling.pixel_classification.cost_head import CostHead
from ovseg_d2.modeling.pixel_classification.pixel_text_alignment import (
    PixelToTextTransformer,
    TextToPixelProjection,
)
from ovseg_d2.structures import ImageBatch, SegmentationTargets, TextClasses, Vocabulary

_KEY = "MODEL.OVSEG.FGA_SEG"


@META_ARCH_REGISTRY.register()
class FGASeg(ScoreSegmentor):
    """Queries and values of both of CLIP's towers train, so that texts are encoded in every iteration."""

    #: Whether ``FGA_SEG`` asks for what FGA-seg adds to CAT-Seg.
    has_additions = True

    @configurable
    def __init__(
        self,
        *,
        clip_frame: MaskEncoder,
        cost_head: CostHead,
        guidance: nn.ModuleList,
        guidance_layers: Sequence[str],
        text_alignment: PixelToTextTransformer | None = None,
        text_projection: TextToPixelProjection | None = None,
        text_prompts: DeepTextPrompts | None = None,
        align_loss: str = "bce",
        align_weight: float = 0.02,
        aux_weights: Sequence[float] = (0.2, 1.0, 1.0),
        class_loss: str = "bce",
        pooling: int = 2,
        test_pooling: int = 1,
        **shared: Any,
    ) -> None:
        """
        Args:
            clip_frame: the images as CLIP gets them.
            cost_head: dense features and texts -> class maps.
            guidance: makes of CLIP's maps ``guidance_layers`` those that guide the decoder, 2 and 4 times as large.
            text_alignment: makes texts that know an image's pixels; None: all images have the same.
            text_projection: of the T2P loss; None: there is no such loss.
            text_prompts: learned tokens in the text tower (Table VII).
            align_loss, align_weight: of the T2P loss.
            aux_weights: of the cost head's auxiliary predictions, in its order.
            class_loss: "bce", every class by itself, or "ce", a softmax over the classes.
            pooling, test_pooling: of the aggregation over classes, in training and in evaluation.
            shared: see :class:`ScoreSegmentor`.

        Raises:
            ValueError: another class loss, other than three weights, or an unknown alignment loss.
        """
        super().__init__(**shared)
        for name, value, allowed in (
            ("CLASS_LOSS", class_loss, ("bce", "ce")),
            ("ALIGN_LOSS", align_loss, ("bce", "mse")),
        ):
            if value not in allowed:
                raise ValueError(f"{_KEY}.{name} is {value!r}; allowed are {', '.join(allowed)}")
        if len(aux_weights) != 3:
            raise ValueError(f"{_KEY}.AUX_WEIGHTS is {list(aux_weights)}; expected one for each of 3 auxiliary heads")
        self.clip_frame = clip_frame
        self.cost_head = cost_head
        self.guidance, self.guidance_layers = guidance, tuple(guidance_layers)
        self.text_alignment, self.text_projection = text_alignment, text_projection
        self.text_prompts = text_prompts
        self.align_loss, self.align_weight = align_loss, align_weight
        self.aux_weights = tuple(aux_weights)
        self.class_loss = class_loss
        self.independent_classes = class_loss == "bce"
        self.pooling, self.test_pooling = pooling, test_pooling
        self.train(self.training)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        options, additions = cfg.MODEL.OVSEG.FGA_SEG, cls.has_additions
        # Windows of any size are brought to CLIP's.
        shared = cls.shared_from_config(cfg, window_divisibility=1, **_visual_options(cfg))
        clip: Clip = shared["clip"]
        apply_policy(clip.text, cfg.MODEL.OVSEG.TEXT.TRAINABLE)
        _freeze_last_queries(clip)
        text_prompts = None
        if options.PROMPT_LENGTH:
            clip.visual.prompts = PromptTokens(
                num_layers=len(clip.visual.blocks) - 1, num_tokens=options.PROMPT_LENGTH, dim=clip.visual.width
            )
            text_prompts = DeepTextPrompts(
                num_layers=clip.text.num_layers, num_tokens=options.PROMPT_LENGTH, dim=clip.text.width
            )
        text_alignment = text_projection = None
        if additions and options.P2T_LAYERS:
            text_alignment = PixelToTextTransformer(
                dim=clip.embed_dim,
                num_heads=options.P2T_HEADS,
                depth=options.P2T_LAYERS,
                residual_scale=options.RESIDUAL_SCALE,
                train_residual_scale=options.LEARN_RESIDUAL_SCALE,
            )
        if additions and options.ALIGN_WEIGHT:
            text_projection = TextToPixelProjection(dim=clip.embed_dim)
        return {
            "clip_frame": MaskEncoder.from_config(cfg, crops=False),
            "cost_head": build_cost_head(
                cfg,
                dim=clip.embed_dim,
                num_prompts=len(shared["text_classifier"].templates),
                local_similarity=additions and options.LOCAL_SIMILARITY,
                fast=additions and options.FAST,
            ),
            "guidance": nn.ModuleList(
                nn.ConvTranspose2d(clip.visual.width, dim, factor, stride=factor)
                for dim, factor in zip(options.DECODER_GUIDANCE_DIMS, (2, 4), strict=True)
            ),
            "guidance_layers": clip.visual.out_layers,
            "text_alignment": text_alignment,
            "text_projection": text_projection,
            "text_prompts": text_prompts,
            "align_loss": options.ALIGN_LOSS,
            "align_weight": options.ALIGN_WEIGHT,
            "aux_weights": options.AUX_WEIGHTS,
            "class_loss": options.CLASS_LOSS,
            "pooling": options.POOLING,
            "test_pooling": options.TEST_POOLING,
            **shared,
        }

    def train(self, mode: bool = True) -> FGASeg:
        super().train(mode)
        for layer in self.cost_head.aggregation.layers:
            layer.classes.pooling = self.pooling if mode else self.test_pooling
        return self

    def text(self, vocabulary: Vocabulary) -> TextClasses:
        """Embeddings (K, P, D): of a class with several names the first."""
        return self.text_classifier(self.clip.text, first_names(vocabulary), prompts=self.text_prompts)

    def losses(
        self, images: ImageBatch, targets: Sequence[SegmentationTargets], vocabulary: Vocabulary | None
    ) -> dict[str, Tensor]:
        frame, dense, text, guidance = self.encode(images, self.required(vocabulary))
        maps = self.cost_head(dense, text, guidance)
        labels = pixel_labels(targets, images.padded_size)
        loss = pixel_binary_cross_entropy if self.class_loss == "bce" else pixel_cross_entropy
        losses = {"loss_sem_seg": loss(self.on_frame(maps.logits, frame, images), labels)}
        for i, logits in enumerate(maps.aux_logits):
            losses[f"loss_aux_{i}"] = self.aux_weights[i] * loss(self.on_frame(logits, frame, images), labels)
        if self.text_projection is not None:
            aligned = self.text_projection(dense, text.expand(len(dense), -1, -1, -1))
            losses["loss_align"] = self.align_weight * text_pixel_alignment_loss(
                self.on_frame(aligned, frame, images), labels, self.align_loss
            )
        return losses

    def encode(self, images: ImageBatch, vocabulary: Vocabulary) -> tuple[ImageBatch, Tensor, Tensor, list[Tensor]]:
        """
        Returns:
            The images as CLIP gets them, its dense features (N, D, h, w), the texts (N, K, P, D), or (1, K, P, D) where
            they do not depend on the image, and the maps (N, C', 2h, 2w) and (N, C'', 4h, 4w) that guide the decoder.
        """
        frame = self.clip_frame.clip_copy(images, divisor=divisor_of(self.clip.visual))
        features = self.clip.visual(frame.tensor)
        text = self.text(vocabulary).embeds
        text = text[None] if self.text_alignment is None else self.text_alignment(features.dense, text)
        guidance = [
            upsample(features.layers[name]) for upsample, name in zip(self.guidance, self.guidance_layers, strict=True)
        ]
        return frame, features.dense, text, guidance

    def on_frame(self, maps: Tensor, frame: ImageBatch, images: ImageBatch) -> Tensor:
        """Maps (N, C, h, w) on CLIP's copy of the images, on the padded images themselves; at any resolution."""
        same = frame.image_sizes == images.image_sizes and frame.padded_size == images.padded_size
        if same or self.clip_frame.resize == PADDED_SQUARE:
            return maps
        maps = F.interpolate(maps, size=frame.padded_size, mode="bilinear", align_corners=False)
        return self.clip_frame.to_frame(maps, frame, images)

    def batch_logits(self, images: ImageBatch, vocabulary: Vocabulary) -> Tensor:
        frame, dense, text, guidance = self.encode(images, vocabulary)
        return self.on_frame(self.cost_head(dense, text, guidance).logits, frame, images)

    def pixel_logits(self, images: Tensor, vocabulary: Vocabulary) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        batch = ImageBatch(tensor=images, image_sizes=[size] * len(images), image_ids=list(range(len(images))))
        return self.batch_logits(batch, vocabulary)


@META_ARCH_REGISTRY.register()
class CATSeg(FGASeg):
    """The same without FGA-seg's additions, whatever ``FGA_SEG`` says of them."""

    has_additions = False


def _visual_options(cfg: CfgNode) -> dict[str, Any]:
    """What the image encoder must compute.

    Raises:
        ValueError: CLIP is no ViT, or other than two of its blocks guide the decoder.
    """
    name, layers = cfg.MODEL.OVSEG.CLIP.NAME, cfg.MODEL.OVSEG.FGA_SEG.GUIDANCE_LAYERS
    kind = tower_kind(name)
    if kind != "vit":
        raise ValueError(f"MODEL.OVSEG.CLIP.NAME: {name} is of the kind {kind!r}; CATSeg and FGASeg take a ViT")
    if len(layers) != 2:
        raise ValueError(f"{_KEY}.GUIDANCE_LAYERS is {list(layers)}; expected two blocks, counted from 0")
    return {"out_layers": [f"block{i}" for i in layers], "last_block": "value_cls", "image_embedding": False}


def _freeze_last_queries(clip: Clip) -> None:
    """The last block of the image tower passes values on, whatever its queries and keys are."""
    attn = clip.visual.blocks[-1].attn
    if attn.in_proj_weight is None:
        attn.q_proj_weight.requires_grad_(False)
        attn.k_proj_weight.requires_grad_(False)
