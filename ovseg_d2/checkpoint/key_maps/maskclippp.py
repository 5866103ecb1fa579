"""MaskCLIP++: what it tuned of CLIP, and its similarity; no mask generator."""

from __future__ import annotations

from ovseg_d2.checkpoint.key_maps.base import KeyMap, Rules, starting_with
from ovseg_d2.modeling.clip.eva import EVA_CLIP_RENAMES

_TOWER = "visual_encoder.proxy."
_RULES: Rules = (
    (r"^visual_encoder\.proxy\.", "clip.visual.tower."),
    (r"^visual_encoder\.mask_logit_scale$", "clip.visual.mask_logit_scale"),
    (r"^text_encoder\.logit_scale$", "clip.logit_scale"),
    # EVA's text tower is a module of its own, open_clip's lies open.
    (r"^text_encoder\.(proxy\.)?", "clip.text."),
    (r"^psm\.img2text\.", "similarity.attn."),
    (r"^psm\.ln_1\.", "similarity.norm."),
    # Beside an attention the linear similarity is its residual.
    (r"^psm\.corr_proj_in\.0\.", "similarity.expand."),
    (r"^psm\.corr_proj_out\.0\.", "similarity.reduce."),
    (r"^psm\.corrs_in\.(0\.)?", "similarity.residual.expand."),
    (r"^psm\.corrs_out\.(0\.)?", "similarity.residual.reduce."),
    (r"^psm\.", "similarity."),
)
# EVA-CLIP's image tower is timm's trunk in ours.
_EVA_RULES: Rules = (
    *((rf"^(visual_encoder\.proxy\..*){pattern}", rf"\g<1>{ours}") for pattern, ours in EVA_CLIP_RENAMES),
    (r"^visual_encoder\.proxy\.", "clip.visual.tower.trunk."),
)
#: Rotary tables and causal masks, which some files hold, are computed.
_DROPPED = r"^visual_encoder\.proxy\.(.*\.)?rope\.|^text_encoder\.(.*\.)?attn_mask$"

MASKCLIPPP = KeyMap(
    name="public MaskCLIP++",
    recognises=starting_with(_TOWER),
    rules=_RULES,
    dropped=_DROPPED,
)
MASKCLIPPP_EVA01 = KeyMap(
    name="public MaskCLIP++ on EVA-01",
    recognises=starting_with(f"{_TOWER}blocks.0.attn.qkv."),
    rules=(*_EVA_RULES, *_RULES),
    dropped=_DROPPED,
)
MASKCLIPPP_EVA02 = KeyMap(
    name="public MaskCLIP++ on EVA-02",
    recognises=starting_with(f"{_TOWER}blocks.0.attn.q_proj."),
    # The biases of unfused projections are parameters of their own in EVA-CLIP.
    rules=((r"^(visual_encoder\.proxy\..*\.attn\.)([qv])_bias$", r"\1\2_proj.bias"), *_EVA_RULES, *_RULES),
    dropped=_DROPPED,
)
