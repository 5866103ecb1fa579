"""MaskCLIP++: what it tuned of CLIP, and its similarity; no mask generator."""

from __future__ import annotations

from ovseg_d2.checkpoint.key_maps.base import KeyMap, starting_with

MASKCLIPPP = KeyMap(
    name="public MaskCLIP++",
    recognises=starting_with("visual_encoder.proxy."),
    rules=(
        (r"^visual_encoder\.proxy\.", "clip.visual.tower."),
        (r"^visual_encoder\.mask_logit_scale$", "clip.visual.mask_logit_scale"),
        (r"^text_encoder\.logit_scale$", "clip.logit_scale"),
        (r"^text_encoder\.(proxy\.)?", "clip.text."),
        (r"^psm\.img2text\.", "similarity.attn."),
        (r"^psm\.ln_1\.", "similarity.norm."),
        # Beside an attention the linear similarity is its residual.
        (r"^psm\.corr_proj_in\.0\.", "similarity.expand."),
        (r"^psm\.corr_proj_out\.0\.", "similarity.reduce."),
        (r"^psm\.corrs_in\.(0\.)?", "similarity.residual.expand."),
        (r"^psm\.corrs_out\.(0\.)?", "similarity.residual.reduce."),
        (r"^psm\.", "similarity."),
    ),
)
