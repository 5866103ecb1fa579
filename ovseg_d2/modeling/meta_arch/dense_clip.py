"""DenseCLIP (arXiv 2112.01518): pixels are matched with texts that know the image, and Semantic FPN sees the scores.

The pixel-text baseline of MTA-CLIP's Tables 1 to 3; without texts it is their CLIP + Semantic FPN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.backbones.clip_resnet import convert_norms
from ovseg_d2.modeling.backbones.clip_vit_fpn import set_position_grid
from ovseg_d2.modeling.backbones.vit_pyramid import Pyramid
from ovseg_d2.modeling.clip.architectures import tower_kind
from ovseg_d2.modeling.clip.build import clip_tokenizer
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.clip.name_tokenizer import NameTokenizer, first_names
from ovseg_d2.modeling.clip.prompts import LearnableContexts
from ovseg_d2.modeling.layers.context_decoder import ContextDecoder
from ovseg_d2.modeling.layers.semantic_fpn import SemanticFPN
from ovseg_d2.modeling.losses.pixel_losses import pixel_cross_entropy, pixel_labels
from ovseg_d2.modeling.meta_arch.pixel_segmentor import PixelSegmentor
from ovseg_d2.modeling.text_classifier import TextClassifier
from ovseg_d2.structures import ClipFeatures, ImageBatch, SegmentationTargets, Vocabulary

FEATURES = ("res2", "res3", "res4", "res5")


class PixelTextScores(nn.Module):
    """Cosines of positions and of texts behind learned contexts, to which the image adds a little (section 3.3)."""

    def __init__(
        self,
        *,
        embed_dim: int,
        contexts: LearnableContexts,
        context_decoder: ContextDecoder,
        residual_scale: float = 1e-4,
    ) -> None:
        """
        Args:
            embed_dim: D.
            contexts: one of them, shared by all classes.
            residual_scale: gamma at first.
        """
        super().__init__()
        self.contexts = contexts
        self.context_decoder = context_decoder
        self.gamma = nn.Parameter(torch.full((embed_dim,), residual_scale))

    def forward(self, text_embeds: Tensor, features: ClipFeatures) -> Tensor:
        """Texts (K, D), of the length that the tower gave them, and an image's features -> (N, K, h, w) in [-1, 1]."""
        dense = features.dense
        tokens = torch.cat([features.image_embeds[:, None], dense.flatten(2).transpose(1, 2)], dim=1)
        text_embeds = text_embeds.expand(len(dense), -1, -1)
        text_embeds = text_embeds + self.gamma * self.context_decoder(text_embeds, tokens)
        with torch.autocast(device_type=dense.device.type, enabled=False):
            text_embeds = F.normalize(text_embeds.float(), dim=-1)
            return torch.einsum("nkd,ndhw->nkhw", text_embeds, F.normalize(dense.float(), dim=1))


@META_ARCH_REGISTRY.register()
class DenseCLIP(PixelSegmentor):
    """CLIP's image tower trains as a backbone; its text tower is frozen. The vocabulary is closed."""

    @configurable
    def __init__(
        self,
        *,
        head: SemanticFPN,
        num_classes: int,
        pyramid: Pyramid | None = None,
        scores: PixelTextScores | None = None,
        score_feature: str = "res5",
        temperature: float = 0.07,
        score_weight: float = 0.4,
        **shared: Any,
    ) -> None:
        """
        Args:
            head: of maps ``res2`` to ``res5``, with ``scores`` K more channels in ``score_feature``.
            num_classes: K.
            pyramid: CLIP's maps -> the four maps; None where CLIP has them itself.
            scores: None: no texts, plain CLIP with Semantic FPN.
            score_feature: the map of the resolution of CLIP's dense embeddings.
            temperature, score_weight: of the loss of the scores.
            shared: see :class:`PixelSegmentor`.
        """
        super().__init__(**shared)
        self.head = head
        self.num_classes = num_classes
        self.pyramid = pyramid
        self.scores = scores
        self.score_feature = score_feature
        self.temperature = temperature
        self.score_weight = score_weight

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        options, num_classes = cfg.MODEL.OVSEG.DENSE_CLIP, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        is_vit = _tower_kind(cfg) == "vit"
        shared = cls.shared_from_config(cfg, **_visual_options(cfg))
        clip: Clip = shared["clip"]
        if is_vit:
            if cfg.MODEL.CLIP_VIT_FPN.IMAGE_SIZE:
                set_position_grid(clip.visual, cfg.MODEL.CLIP_VIT_FPN.IMAGE_SIZE, key="MODEL.CLIP_VIT_FPN.IMAGE_SIZE")
            pyramid = Pyramid(
                width=clip.visual.width,
                patch_size=clip.visual.patch_size,
                layers=clip.visual.out_layers,
                norm=cfg.MODEL.CLIP_VIT_FPN.NORM,
            )
        else:
            pyramid = None
            convert_norms(clip.visual, cfg.MODEL.CLIP_RESNET.NORM)
        shapes = (pyramid or clip.visual).output_shape()
        score_feature = "res4" if is_vit else "res5"
        channels = {name: shapes[name].channels for name in FEATURES}
        scores = None
        if options.TEXT:
            channels[score_feature] += num_classes
            scores = _build_scores(cfg, clip)
            shared["text_classifier"] = _text_classifier(cfg, clip)
        else:
            _freeze_embedding(clip)
        coarsest = shapes["res5"].stride
        if shared["size_divisibility"] % coarsest or not shared["size_divisibility"]:
            raise ValueError(
                f"MODEL.OVSEG.SIZE_DIVISIBILITY is {shared['size_divisibility']}; expected a multiple of {coarsest}, "
                f"the stride of the coarsest map of {cfg.MODEL.OVSEG.CLIP.NAME}"
            )
        head = SemanticFPN(
            input_shape={name: ShapeSpec(channels=channels[name], stride=shapes[name].stride) for name in FEATURES},
            num_classes=num_classes,
            dim=options.DIM,
            norm=options.NORM,
            dropout=options.DROPOUT,
        )
        return {
            "head": head,
            "num_classes": num_classes,
            "pyramid": pyramid,
            "scores": scores,
            "score_feature": score_feature,
            "temperature": options.TEMPERATURE,
            "score_weight": options.SCORE_WEIGHT,
            **shared,
        }

    def losses(
        self, images: ImageBatch, targets: Sequence[SegmentationTargets], vocabulary: Vocabulary | None
    ) -> dict[str, Tensor]:
        logits, scores = self.logits_and_scores(images.tensor, self.required(vocabulary))
        labels = pixel_labels(targets, images.padded_size)
        losses = {"loss_sem_seg": pixel_cross_entropy(logits, labels)}
        if scores is not None:
            losses["loss_score"] = self.score_weight * pixel_cross_entropy(scores / self.temperature, labels)
        return losses

    def pixel_logits(self, images: Tensor, vocabulary: Vocabulary) -> Tensor:
        return self.logits_and_scores(images, vocabulary)[0]

    def logits_and_scores(self, images: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor | None]:
        """Normalised images (N, 3, H, W) -> logits (N, K, H / 4, W / 4), and cosines (N, K, h, w) if there are texts.

        Raises:
            ValueError: a vocabulary of another number of classes than the model's.
        """
        if len(vocabulary) != self.num_classes:
            raise ValueError(
                f"{len(vocabulary)} classes ({vocabulary.names[0]}, ...), but MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
                f"{self.num_classes}; DenseCLIP's vocabulary is closed"
            )
        features = self.clip.visual(images)
        maps = self.maps(features.layers)
        if self.scores is None:
            return self.head(maps), None
        text = self.text_classifier(self.clip.text, first_names(vocabulary), prompts=self.scores.contexts)
        scores = self.scores(text.embeds[:, 0], features)
        maps[self.score_feature] = torch.cat([maps[self.score_feature], scores.to(maps[self.score_feature])], dim=1)
        return self.head(maps), scores

    def maps(self, layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """CLIP's intermediate maps -> ``res2`` to ``res5``."""
        layers = layers if self.pyramid is None else self.pyramid.pyramid(layers)
        return {name: layers[name] for name in FEATURES}


def _tower_kind(cfg: CfgNode) -> str:
    """
    Raises:
        ValueError: CLIP is neither a ResNet nor a ViT.
    """
    name = cfg.MODEL.OVSEG.CLIP.NAME
    kind = tower_kind(name)
    if kind not in ("resnet", "vit"):
        raise ValueError(f"MODEL.OVSEG.CLIP.NAME: {name} is of the kind {kind!r}; DenseCLIP takes a ResNet or a ViT")
    return kind


def _visual_options(cfg: CfgNode) -> dict[str, Any]:
    """What the image encoder must compute."""
    if _tower_kind(cfg) == "resnet":
        return {"dense": "attention" if cfg.MODEL.OVSEG.DENSE_CLIP.TEXT else "none", "pos_mode": "bilinear"}
    fpn = cfg.MODEL.CLIP_VIT_FPN
    return {
        "out_layers": [f"block{i}" for i in fpn.OUT_BLOCKS],
        "last_block": "full" if cfg.MODEL.OVSEG.DENSE_CLIP.TEXT else "none",
        "extra_class_embedding": True,
        "drop_path_rate": fpn.DROP_PATH_RATE,
        "pos_mode": "bilinear",
    }


def _build_scores(cfg: CfgNode, clip: Clip) -> PixelTextScores:
    options = cfg.MODEL.OVSEG.DENSE_CLIP
    return PixelTextScores(
        embed_dim=clip.embed_dim,
        contexts=LearnableContexts(
            num_contexts=1, length=options.CONTEXT_LENGTH, dim=clip.text.width, std=options.CONTEXT_INIT_STD
        ),
        context_decoder=ContextDecoder(
            embed_dim=clip.embed_dim,
            dim=options.DECODER_DIM,
            num_heads=options.DECODER_HEADS,
            num_layers=options.DECODER_LAYERS,
        ),
    )


def _text_classifier(cfg: CfgNode, clip: Clip) -> TextClassifier:
    """Names alone, whatever ``TEXT.TEMPLATES`` are: contexts stand before them."""
    options, name = cfg.MODEL.OVSEG.DENSE_CLIP, cfg.MODEL.OVSEG.CLIP.NAME
    tokenizer = NameTokenizer.beside_context(
        clip_tokenizer(name),
        section="MODEL.OVSEG.DENSE_CLIP",
        text_length=options.TEXT_LENGTH,
        context_length=options.CONTEXT_LENGTH,
        clip_name=name,
        places=clip.text.context_length,
    )
    return TextClassifier(tokenizer=tokenizer, templates=("{}",), normalise=False)


def _freeze_embedding(clip: Clip) -> None:
    """Freeze what makes the image's embedding, which no map depends on."""
    tower = clip.visual.tower
    for name in ("attnpool", "ln_post", "proj"):
        if hasattr(tower, name):
            getattr(tower, name).requires_grad_(False)
