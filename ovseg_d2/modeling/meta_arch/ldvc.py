"""LDVC (arXiv 2403.08426) and its baseline ZegCLIP (arXiv 2212.03588): prompts tune a frozen CLIP, whose pixels are
matched with class texts that know the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.backbones.clip_vit_fpn import set_position_grid
from ovseg_d2.modeling.clip.architectures import tower_kind
from ovseg_d2.modeling.clip.build import clip_tokenizer
from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.clip.image_prompts import DeepImagePrompts
from ovseg_d2.modeling.clip.name_tokenizer import first_names
from ovseg_d2.modeling.clip.prompts import DeepTextPrompts, template_tokens
from ovseg_d2.modeling.inference.mask_inference import MaskInference
from ovseg_d2.modeling.losses.focal_dice import FocalDiceLoss
from ovseg_d2.modeling.losses.pixel_losses import pixel_labels
from ovseg_d2.modeling.losses.pseudo_labels import pseudo_labels, unseen_ids
from ovseg_d2.modeling.mask_classification.host_ensemble import calibrated
from ovseg_d2.modeling.meta_arch.score_segmentor import ScoreSegmentor
from ovseg_d2.modeling.meta_arch.zero_shot_setting import check_setting
from ovseg_d2.modeling.pixel_classification.attention_to_mask import AttentionToMaskDecoder
from ovseg_d2.modeling.pixel_classification.local_consensus import LocalConsensusDecoder, TextAdapter
from ovseg_d2.modeling.text_classifier import TextClassifier, averaged
from ovseg_d2.structures import ImageBatch, MaskProposals, SegmentationTargets, TextClasses, Vocabulary

_KEY = "MODEL.OVSEG.LDVC"


@META_ARCH_REGISTRY.register()
class LDVC(ScoreSegmentor):
    """Both towers are prompted; in the decoder pixels look at each other, where they are alike, and at the texts."""

    #: Whether the decoder sees blocks of CLIP's.
    has_taps = True

    @configurable
    def __init__(
        self,
        *,
        text_adapter: TextAdapter,
        decoder: nn.Module,
        loss: FocalDiceLoss,
        aux_weight: float = 0.0,
        setting: str = "inductive",
        text_prompts: DeepTextPrompts | None = None,
        template: Tensor | None = None,
        calibration: float = 0.0,
        **shared: Any,
    ) -> None:
        """
        Args:
            text_adapter: texts and an image's embedding -> the texts as that image has them.
            decoder: positions and those texts -> class logits.
            loss: of logits and labels.
            aux_weight: of the loss after earlier blocks of the decoder; 0: there is none.
            setting: "inductive"; "transductive": pixels of unseen classes train with the model's own guesses;
                "supervised".
            text_prompts: stand before a name in the text tower; None: sentences of ``text_classifier``.
            template: (1, L) int64, what ``text_prompts`` start as unless a file has them; None: they start at random.
            calibration: subtracted from the scores of seen classes in the inductive setting.
            shared: see :class:`ScoreSegmentor`.
        """
        super().__init__(**shared)
        self.text_adapter = text_adapter
        self.decoder = decoder
        self.loss, self.aux_weight = loss, aux_weight
        self.setting = setting
        self.text_prompts = text_prompts
        self.template = template
        self.calibration = calibration if setting == "inductive" else 0.0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        options = cfg.MODEL.OVSEG.LDVC
        shared = cls.shared_from_config(cfg, **cls.visual_options(cfg))
        check_setting(options.SETTING, trained=shared["vocabulary"], weights=cfg.MODEL.WEIGHTS, key=f"{_KEY}.SETTING")
        clip: Clip = shared["clip"]
        if options.POSITION_SIZE:
            set_position_grid(clip.visual, options.POSITION_SIZE, key=f"{_KEY}.POSITION_SIZE")
        if options.VISUAL_PROMPTS:
            clip.visual.prompts = DeepImagePrompts(
                num_layers=len(clip.visual.blocks),
                num_tokens=options.VISUAL_PROMPTS,
                dim=clip.visual.width,
                patch_size=clip.visual.patch_size,
                dropout=options.PROMPT_DROPOUT,
                project=options.PROMPT_PROJ,
                last_norm=options.PROMPT_NORM,
            )
        text_prompts = template = None
        if options.TEXT_PROMPTS:
            text_prompts, template = _text_prompts(cfg, clip)
            shared["text_classifier"] = _names_alone(cfg, shared["vocabulary"])
        return {
            "text_adapter": TextAdapter(dim=clip.embed_dim),
            "decoder": cls.build_decoder(cfg, clip),
            "loss": FocalDiceLoss(
                focal_weight=options.FOCAL_WEIGHT,
                dice_weight=options.DICE_WEIGHT,
                mask_ignored=options.MASK_IGNORED,
            ),
            "aux_weight": options.AUX_WEIGHT,
            "setting": options.SETTING,
            "text_prompts": text_prompts,
            "template": template,
            "calibration": cfg.MODEL.OVSEG.ENSEMBLE.CALIBRATE,
            **shared,
        }

    @classmethod
    def visual_options(cls, cfg: CfgNode) -> dict[str, Any]:
        """What the image encoder must compute.

        Raises:
            ValueError: CLIP is no ViT of open_clip's, or the decoder sees none of its blocks.
        """
        options, name = cfg.MODEL.OVSEG.LDVC, cfg.MODEL.OVSEG.CLIP.NAME
        kind = tower_kind(name)
        if kind != "vit":
            raise ValueError(f"MODEL.OVSEG.CLIP.NAME: {name} is of the kind {kind!r}; {cls.__name__} takes a ViT")
        if cls.has_taps and not options.TAPS:
            raise ValueError(f"{_KEY}.TAPS is empty; expected a block of CLIP's for each block of the decoder")
        taps = options.TAPS if cls.has_taps else ()
        return {
            "out_layers": [f"block{i}" for i in taps],
            "extra_class_embedding": options.EXTRA_CLASS_EMBEDDING,
            "pos_mode": "bilinear",
        }

    @classmethod
    def build_decoder(cls, cfg: CfgNode, clip: Clip) -> nn.Module:
        """The decoder that ``MODEL.OVSEG.LDVC`` describes."""
        options = cfg.MODEL.OVSEG.LDVC
        return LocalConsensusDecoder(
            dim=clip.embed_dim,
            layer_dim=clip.visual.width,
            num_blocks=len(options.TAPS),
            num_heads=options.HEADS,
            ffn_dim=options.FFN_DIM,
            dropout=options.DROPOUT,
            window_size=options.WINDOW_SIZE,
            top_k=options.TOP_K,
            scale=options.SCALE,
            form=options.FORM,
            conv_zero_init=options.TAP_ZERO_INIT,
            norm_layers=options.TAP_NORM,
        )

    def fill_missing(self, given: set[str]) -> set[str]:
        """Start the text prompts as the template's states in the pretrained text tower, unless a file gave them.

        Args:
            given: names of the tensors that files gave.

        Returns:
            Names of the tensors that were filled in.

        Raises:
            ValueError: self-training that starts from less than a whole model.
        """
        if self.setting == "transductive":
            missing = [name for name, p in self.named_parameters() if p.requires_grad and name not in given]
            if missing:
                raise ValueError(
                    f"{_KEY}.SETTING is 'transductive', but MODEL.WEIGHTS has no {missing[0]} ({len(missing)} tensors "
                    "are missing); expected the checkpoint of an inductive training of this model"
                )
        names = {"text_prompts.prompts"} - given
        if self.template is None or not names:
            return set()
        self.text_prompts.init_from_template(self.clip.text, self.template.to(self.device))
        return names

    def text(self, vocabulary: Vocabulary) -> TextClasses:
        """Embeddings (K, 1, D): of a class with several names the first; of several sentences their mean."""
        return averaged(self.text_classifier(self.clip.text, first_names(vocabulary), prompts=self.text_prompts))

    def losses(
        self, images: ImageBatch, targets: Sequence[SegmentationTargets], vocabulary: Vocabulary | None
    ) -> dict[str, Tensor]:
        vocabulary = self.required(vocabulary)
        *earlier, logits = self.decode(*self.encode(images.tensor, vocabulary))
        labels = pixel_labels(targets, images.padded_size)
        if self.setting == "transductive":
            labels = pseudo_labels(logits, labels, unseen_ids(vocabulary))
        losses = self.loss(logits, labels)
        for i, block_logits in enumerate(earlier if self.aux_weight else ()):
            block_losses = self.loss(block_logits, labels)
            losses |= {f"{name}_{i}": self.aux_weight * loss for name, loss in block_losses.items()}
        return losses

    def pixel_logits(self, images: Tensor, vocabulary: Vocabulary) -> Tensor:
        """As in the base class. Windows of small images need not be made of whole patches; they are padded to be."""
        (height, width), patch = images.shape[-2:], self.clip.visual.patch_size
        images = F.pad(images, (0, -width % patch, 0, -height % patch))
        logits = self.decode(*self.encode(images, vocabulary))[-1]
        if images.shape[-2:] == (height, width):
            return logits
        logits = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
        return logits[..., :height, :width]

    def encode(self, images: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor, list[Tensor]]:
        """
        Args:
            images: (N, 3, H, W), normalised.

        Returns:
            CLIP's embeddings of the positions (N, D, h, w), unit vectors, the texts (N, K, D) as the images have them,
            and the maps (N, C, h, w) of single blocks, in the decoder's order.
        """
        features = self.clip.visual(images)
        text = self.text(vocabulary).embeds[:, 0]
        layers = [features.layers[name] for name in self.clip.visual.out_layers]
        image_embeds = F.normalize(features.image_embeds, dim=-1)
        return F.normalize(features.dense, dim=1), self.text_adapter(image_embeds, text), layers

    def decode(self, dense: Tensor, text: Tensor, layers: list[Tensor]) -> list[Tensor]:
        """What :meth:`encode` gives -> logits (N, K, h, w) after each of the decoder's blocks, the last ones count."""
        return self.decoder.block_logits(dense, text, layers)

    def results(
        self,
        proposals: MaskProposals,
        images: ImageBatch,
        batched_inputs: Sequence[dict[str, Any]],
        vocabulary: Vocabulary,
        inference: MaskInference,
    ) -> list[dict[str, Any]]:
        """``sem_seg``: scores (K, H, W), those of seen classes lowered by the calibration."""
        results = super().results(proposals, images, batched_inputs, vocabulary, inference)
        if self.calibration:
            seen = self.text(vocabulary).seen
            for result in results:
                result["sem_seg"] = calibrated(result["sem_seg"], seen, self.calibration)
        return results


@META_ARCH_REGISTRY.register()
class ZegCLIP(LDVC):
    """The same with the decoder of ZegCLIP: texts look at the pixels, and their attention is the logits. Its own recipe
    has no text prompts."""

    has_taps = False

    @classmethod
    def build_decoder(cls, cfg: CfgNode, clip: Clip) -> AttentionToMaskDecoder:
        options = cfg.MODEL.OVSEG.LDVC
        return AttentionToMaskDecoder(
            dim=clip.embed_dim,
            num_layers=options.ATM_LAYERS,
            num_heads=options.HEADS,
            ffn_dim=options.FFN_DIM,
            dropout=options.DROPOUT,
        )

    def decode(self, dense: Tensor, text: Tensor, layers: list[Tensor]) -> list[Tensor]:
        return [self.decoder(dense, text)]


def _text_prompts(cfg: CfgNode, clip: Clip) -> tuple[DeepTextPrompts, Tensor | None]:
    """The deep text prompts, and the tokens of what they start as; None: random values."""
    options = cfg.MODEL.OVSEG.LDVC
    prompts = DeepTextPrompts(num_layers=clip.text.num_layers, num_tokens=options.TEXT_PROMPTS, dim=clip.text.width)
    if not options.TEXT_INIT:
        return prompts, None
    name, key = cfg.MODEL.OVSEG.CLIP.NAME, f"{_KEY}.TEXT_INIT"
    return prompts, template_tokens(name, options.TEXT_INIT, num_tokens=options.TEXT_PROMPTS, key=key)


def _names_alone(cfg: CfgNode, vocabulary: Vocabulary | None) -> TextClassifier:
    """Whatever ``TEXT.TEMPLATES`` are: the prompts are the sentence."""
    return TextClassifier(
        tokenizer=clip_tokenizer(cfg.MODEL.OVSEG.CLIP.NAME), templates=("{}",), trained_vocabulary=vocabulary
    )
