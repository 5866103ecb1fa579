"""MaskFormer, Mask2Former and FC-CLIP."""

from __future__ import annotations

from ovseg_d2.checkpoint.key_maps.base import KeyMap, Rules, starting_with

# Modules of the public models, wherever they stand: their parameters without a prefix.
PIXEL_DECODER_RULES: Rules = (
    (r"\btransformer\.level_embed$", "level_embed"),
    (r"\btransformer\.encoder\.layers\.", "encoder."),
    # Numbered from 1 at the finest level.
    *((rf"\badapter_{k}\.", f"lateral.{k - 1}.") for k in range(1, 5)),
    *((rf"\blayer_{k}\.", f"output.{k - 1}.") for k in range(1, 5)),
)
MASKED_ATTENTION_RULES: Rules = (
    (r"\bstatic_query\.", "query_feat."),  # early releases
    (r"\btransformer_self_attention_layers\.(\d+)\.self_attn\.", r"layers.\1.self_attn.attn."),
    (r"\btransformer_self_attention_layers\.(\d+)\.norm\.", r"layers.\1.self_attn.norm."),
    (r"\btransformer_cross_attention_layers\.(\d+)\.multihead_attn\.", r"layers.\1.cross_attn.attn."),
    (r"\btransformer_cross_attention_layers\.(\d+)\.norm\.", r"layers.\1.cross_attn.norm."),
    (r"\btransformer_ffn_layers\.(\d+)\.", r"layers.\1.ffn."),
)
TRANSFORMER_DECODER_RULES: Rules = (
    (r"\btransformer\.decoder\.norm\.", "decoder_norm."),
    (r"\btransformer\.decoder\.layers\.(\d+)\.self_attn\.", r"layers.\1.self_attn.attn."),
    (r"\btransformer\.decoder\.layers\.(\d+)\.norm1\.", r"layers.\1.self_attn.norm."),
    (r"\btransformer\.decoder\.layers\.(\d+)\.multihead_attn\.", r"layers.\1.cross_attn.attn."),
    (r"\btransformer\.decoder\.layers\.(\d+)\.norm2\.", r"layers.\1.cross_attn.norm."),
    (r"\btransformer\.decoder\.layers\.(\d+)\.linear(\d)\.", r"layers.\1.ffn.linear\2."),
    (r"\btransformer\.decoder\.layers\.(\d+)\.norm3\.", r"layers.\1.ffn.norm."),
)

HEAD_RULES: Rules = (
    (r"^sem_seg_head\.pixel_decoder\.", "proposals.pixel_decoder."),
    (r"^sem_seg_head\.predictor\.", "proposals.mask_decoder."),
)
#: The whole generators, with their backbones.
MASKFORMER_RULES: Rules = (
    (r"^backbone\.", "proposals.backbone."),
    *HEAD_RULES,
    *PIXEL_DECODER_RULES,
    *TRANSFORMER_DECODER_RULES,
)
MASK2FORMER_RULES: Rules = (
    (r"^backbone\.", "proposals.backbone."),
    *HEAD_RULES,
    *PIXEL_DECODER_RULES,
    *MASKED_ATTENTION_RULES,
)
#: The class weights of the loss are made from the configuration, tables of Swin where they are needed.
DROPPED = r"^criterion\.empty_weight$|\.(relative_position_index|attn_mask)$"

MASKFORMER = KeyMap(
    name="public MaskFormer",
    recognises=starting_with("sem_seg_head.predictor.transformer.decoder."),
    rules=MASKFORMER_RULES,
    dropped=DROPPED,
)
MASK2FORMER = KeyMap(
    name="public Mask2Former",
    recognises=starting_with("sem_seg_head."),
    rules=(
        # Early files have the pixel decoder's parameters directly in the head.
        (r"^sem_seg_head\.(?!pixel_decoder\.|predictor\.)", "sem_seg_head.pixel_decoder."),
        *MASK2FORMER_RULES,
    ),
    dropped=DROPPED,
)

_TEXT_HEAD = "proposals.mask_decoder.class_embed."
FCCLIP = KeyMap(
    name="public FC-CLIP",
    recognises=starting_with("sem_seg_head.predictor._mask_pooling_proj."),
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
        *MASKED_ATTENTION_RULES,
    ),
    # The loss makes its class weights; a causal mask that some versions of open_clip keep is computed here.
    dropped=r"^criterion\.empty_weight$|^backbone\.clip_model\.attn_mask$",
)
# FC-CLIP with its tuned CLIP; the teacher in training files is the pretrained CLIP again.
MAFT_PLUS = KeyMap(
    name="public MAFT+",
    recognises=starting_with("cdt.cross_atten."),
    rules=(
        (r"^cdt\.cross_atten\.multihead_attn\.", "content_transfer.attn."),
        (r"^cdt\.cross_atten\.MLP\.", "content_transfer.proj."),
        (r"^cdt\.cross_atten\.", "content_transfer."),
        *FCCLIP.rules,
    ),
    dropped=FCCLIP.dropped,
)
