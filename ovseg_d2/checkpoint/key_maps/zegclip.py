"""ZegCLIP, with the CLIP that it prompts."""

from __future__ import annotations

from ovseg_d2.checkpoint.key_maps.base import KeyMap, starting_with

_LAYER = r"^decode_head\.decoder_1\.layers\.(\d+)\."
_LAST = r"^decode_head\.decoder_1\.layers\.2\."

ZEGCLIP = KeyMap(
    name="public ZegCLIP",
    recognises=starting_with("backbone.prompt_embeddings", "decode_head.q_proj."),
    rules=(
        (r"^backbone\.prompt_proj\.", "clip.visual.prompts.proj."),
        (r"^backbone\.prompt_norm\.", "clip.visual.prompts.last_norm."),
        (r"^backbone\.", "clip.visual.tower."),
        (r"^text_encoder\.", "clip.text."),
        (r"^decode_head\.q_proj\.", "text_adapter."),
        (rf"{_LAST}multihead_attn\.([qk])\.", r"decoder.mask_attention.\1_proj."),
        (rf"{_LAYER}multihead_attn\.([qkv])\.", r"decoder.layers.\1.attention.\2_proj."),
        (rf"{_LAYER}multihead_attn\.", r"decoder.layers.\1.attention."),
        (rf"{_LAYER}norm2\.", r"decoder.layers.\1.norm."),
        (rf"{_LAYER}norm3\.", r"decoder.layers.\1.ffn.norm."),
        (rf"{_LAYER}(linear[12])\.", r"decoder.layers.\1.ffn.\2."),
    ),
    # Self-attention is not used in any layer, and of the last one nothing but queries and keys. The loss keeps weights
    # of the classes.
    dropped=(
        rf"{_LAYER}(self_attn|norm1)\.|{_LAST}(multihead_attn\.(v|proj)|norm[23]|linear[12])\.|^decode_head\.loss_decode\."
    ),
    joined={"clip.visual.prompts.embeddings": ("backbone.prompt_embeddings", "backbone.deep_prompt_embeddings")},
)
