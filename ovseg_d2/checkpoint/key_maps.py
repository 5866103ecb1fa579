"""Names in public checkpoints -> names here. The only place that knows the former."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class KeyMap:
    """How one public layout's keys become ours.

    Attributes:
        name: what the layout is called in messages.
        recognises: whether a file's keys are of this layout. Decided by content: state dicts that were filtered or went
            through safetensors have lost their version metadata.
        rules: (pattern, replacement) for ``re.sub``, applied in order to every key.
        dropped: pattern of keys (official names) that have no counterpart here.
    """

    name: str
    recognises: Callable[[set[str]], bool]
    rules: tuple[tuple[str, str], ...]
    dropped: str | None = None

    def rename(self, key: str) -> str | None:
        """Our name of an official key; None if it has no counterpart."""
        if self.dropped and re.search(self.dropped, key):
            return None
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key


def _any_starts_with(prefix: str) -> Callable[[set[str]], bool]:
    return lambda keys: any(key.startswith(prefix) for key in keys)


# Modules of the public Mask2Former, wherever they stand: their parameters without a prefix.
PIXEL_DECODER_RULES = (
    (r"\btransformer\.level_embed$", "level_embed"),
    (r"\btransformer\.encoder\.layers\.", "encoder."),
    # Numbered from 1 at the finest level.
    *((rf"\badapter_{k}\.", f"lateral.{k - 1}.") for k in range(1, 5)),
    *((rf"\blayer_{k}\.", f"output.{k - 1}.") for k in range(1, 5)),
)
MASK_DECODER_RULES = (
    (r"\bstatic_query\.", "query_feat."),  # early releases
    (r"\btransformer_self_attention_layers\.(\d+)\.self_attn\.", r"layers.\1.self_attn.attn."),
    (r"\btransformer_self_attention_layers\.(\d+)\.norm\.", r"layers.\1.self_attn.norm."),
    (r"\btransformer_cross_attention_layers\.(\d+)\.multihead_attn\.", r"layers.\1.cross_attn.attn."),
    (r"\btransformer_cross_attention_layers\.(\d+)\.norm\.", r"layers.\1.cross_attn.norm."),
    (r"\btransformer_ffn_layers\.(\d+)\.", r"layers.\1.ffn."),
)

HEAD_RULES = (
    (r"^sem_seg_head\.pixel_decoder\.", "proposals.pixel_decoder."),
    (r"^sem_seg_head\.predictor\.", "proposals.mask_decoder."),
)

MASK2FORMER = KeyMap(
    name="public Mask2Former",
    recognises=_any_starts_with("sem_seg_head."),
    rules=(
        # Early files have the pixel decoder's parameters directly in the head.
        (r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", "sem_seg_head.pixel_decoder."),
        (r"^backbone\.", "proposals.backbone."),
        *HEAD_RULES,
        *PIXEL_DECODER_RULES,
        *MASK_DECODER_RULES,
    ),
    # The class weights of the loss are made from the configuration.
    dropped=r"^criterion\.empty_weight$|\.(relative_position_index|attn_mask)$",
)

_TEXT_HEAD = "proposals.mask_decoder.class_embed."
FCCLIP = KeyMap(
    name="public FC-CLIP",
    recognises=_any_starts_with("sem_seg_head.predictor._mask_pooling_proj."),
    rules=(
        # The whole of open_clip's CLIP: the image tower under visual., the text tower's parts at the top.
        (r"^backbone\.clip_model\.visual\.", "clip.visual.tower."),
        (r"^backbone\.clip_model\.logit_scale$", "clip.logit_scale"),
        (r"^backbone\.clip_model\.", "clip.text."),
        (r"^void_embedding\.", f"{_TEXT_HEAD}void_embedding."),
        *HEAD_RULES,
        (r"^proposals\.mask_decoder\.class_embed\.layers\.", f"{_TEXT_HEAD}mlp.layers."),
        (r"^proposals\.mask_decoder\._mask_pooling_proj\.0\.", f"{_TEXT_HEAD}pool_norm."),
        (r"^proposals\.mask_decoder\._mask_pooling_proj\.1\.", f"{_TEXT_HEAD}pool_proj."),
        (r"^proposals\.mask_decoder\.logit_scale$", f"{_TEXT_HEAD}logit_scale"),
        *PIXEL_DECODER_RULES,
        *MASK_DECODER_RULES,
    ),
    # The loss makes its class weights; a causal mask that some versions of open_clip keep is computed here.
    dropped=r"^criterion\.empty_weight$|^backbone\.clip_model\.attn_mask$",
)

# Files of backbones alone; where the backbone stands in a model is found when they are loaded.
TORCHVISION_RESNET = KeyMap(
    name="torchvision ResNet",
    recognises=_any_starts_with("layer1.0.conv1."),
    rules=(
        (r"^(?!layer)", "stem."),
        *((rf"^layer{k}\.", f"res{k + 1}.") for k in range(1, 5)),
        (r"\bbn(\d)\.", r"conv\1.norm."),
        (r"\bdownsample\.0\.", "shortcut."),
        (r"\bdownsample\.1\.", "shortcut.norm."),
    ),
    dropped=r"^fc\.",
)
SWIN = KeyMap(
    name="public Swin",
    recognises=_any_starts_with("layers.0.blocks.0.attn.relative_position_bias_table"),
    rules=(),
    # Classification files have one norm at the end; segmentation models have one an output, norm0 to norm3.
    dropped=r"^(head|norm)\.|\.(relative_position_index|attn_mask)$",
)

# The first that recognises a file is taken: FC-CLIP's names are among Mask2Former's, and more.
KEY_MAPS = (FCCLIP, MASK2FORMER, TORCHVISION_RESNET, SWIN)
