"""Official names of the cost volume that CAT-Seg and FGA-seg share."""

from __future__ import annotations

from ovseg_d2.checkpoint.key_maps.base import Rules

_TRANSFORMER = r"^sem_seg_head\.predictor\.transformer\."
_LAYER = rf"{_TRANSFORMER}layers\.(\d+)\."

#: The mask of shifted windows is computed, for any grid.
COST_DROPPED = r"\.swin_block\.block_2\.attn_mask$"

COST_RULES: Rules = (
    # Up, the decoder's stages
    (r"\.double_conv\.0\.", ".conv1."),
    (r"\.double_conv\.1\.", ".norm1."),
    (r"\.double_conv\.3\.", ".conv2."),
    (r"\.double_conv\.4\.", ".norm2."),
    (rf"{_TRANSFORMER}decoder1\.", "cost_head.decoder.stages.0."),
    (rf"{_TRANSFORMER}decoder2\.", "cost_head.decoder.stages.1."),
    (rf"{_TRANSFORMER}corr_local_decoder_projection\.0\.", "cost_head.decoder.local_stage.up."),
    (rf"{_TRANSFORMER}corr_local_decoder_projection\.1\.", "cost_head.decoder.local_stage.conv."),
    (rf"{_TRANSFORMER}decoder_guidance_projection\.(\d+)\.0\.", r"cost_head.decoder.guidance.\1."),
    (rf"{_TRANSFORMER}conv_cat_decoder_1\.", "cost_head.decoder.fusions.0.linear."),
    (rf"{_TRANSFORMER}conv_cat_decoder_2\.", "cost_head.decoder.fusions.1.linear."),
    (rf"{_TRANSFORMER}head_auxi_0\.", "cost_head.aux_head."),
    (rf"{_TRANSFORMER}head_auxi_1\.", "cost_head.decoder.aux_heads.0."),
    (rf"{_TRANSFORMER}head_auxi_2\.", "cost_head.decoder.aux_heads.1."),
    (rf"{_TRANSFORMER}head\.", "cost_head.decoder.head."),
    # embedding
    (rf"{_TRANSFORMER}conv1\.", "cost_head.embedding.global_conv."),
    (rf"{_TRANSFORMER}conv2\.", "cost_head.embedding.local_conv."),
    (rf"{_TRANSFORMER}conv_cat\.", "cost_head.embedding.fusion.linear."),
    # aggregation
    (rf"{_TRANSFORMER}guidance_projection\.0\.", "cost_head.aggregation.image_guidance."),
    (rf"{_TRANSFORMER}text_guidance_projection\.0\.", "cost_head.aggregation.text_guidance."),
    (rf"{_LAYER}swin_block\.block_1\.", r"cost_head.aggregation.layers.\1.spatial.blocks.0."),
    (rf"{_LAYER}swin_block\.block_2\.", r"cost_head.aggregation.layers.\1.spatial.blocks.1."),
    (rf"{_LAYER}swin_block\.", r"cost_head.aggregation.layers.\1.spatial."),
    (rf"{_LAYER}attention\.padding_tokens$", r"cost_head.aggregation.layers.\1.classes.pad_token"),
    (rf"{_LAYER}attention\.padding_guidance$", r"cost_head.aggregation.layers.\1.classes.pad_guidance"),
    (rf"{_LAYER}attention\.MLP\.0\.", r"cost_head.aggregation.layers.\1.classes.mlp.linear1."),
    (rf"{_LAYER}attention\.MLP\.2\.", r"cost_head.aggregation.layers.\1.classes.mlp.linear2."),
    (rf"{_LAYER}attention\.", r"cost_head.aggregation.layers.\1.classes."),
    (r"^(cost_head\.aggregation\..*\.blocks\.\d\.mlp)\.fc", r"\1.linear"),
    (r"^(cost_head\.aggregation\..*\.blocks\.\d)\.attn\.([qkv])\.", r"\1.qkv.\2."),
    (r"^(cost_head\.aggregation\..*\.blocks\.\d)\.attn\.proj\.", r"\1.proj."),
    (r"^(cost_head\.aggregation\..*\.classes\.attention)\.([qkv])\.", r"\1.qkv.\2."),
)
