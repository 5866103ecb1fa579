"""CAT-Seg and FGA-seg, each with the CLIP that it tuned."""

from __future__ import annotations

from ovseg_d2.checkpoint.key_maps.base import KeyMap, Rules, starting_with
from ovseg_d2.checkpoint.key_maps.cost_volume import COST_DROPPED, COST_RULES
from ovseg_d2.checkpoint.key_maps.frozen_clip import clip_rules
from ovseg_d2.checkpoint.key_maps.pixel_alignment import ALIGNMENT_RULES

_CLIP = r"sem_seg_head\.predictor\.clip_model\."
_CATSEG_KEYS = ("sem_seg_head.predictor.clip_model.", "sem_seg_head.predictor.transformer.layers.0.swin_block.")

_RULES: Rules = (
    *clip_rules(_CLIP),
    (r"^upsample1\.", "guidance.0."),
    (r"^upsample2\.", "guidance.1."),
    *COST_RULES,
    *ALIGNMENT_RULES,
    (r"^similarity\.", "cost_head.similarity."),
)
# Some files hold the text tower's causal mask, and the pixel statistics, which are constants.
_DROPPED = rf"{COST_DROPPED}|^{_CLIP}attn_mask$|^(clip_)?pixel_(mean|std)$"

FGASEG = KeyMap(
    name="public FGA-seg",
    recognises=starting_with(*_CATSEG_KEYS, "sem_seg_head.predictor.transformer.Local_align."),
    rules=_RULES,
    dropped=_DROPPED,
)
CATSEG = KeyMap(
    name="public CAT-Seg",
    recognises=starting_with(*_CATSEG_KEYS),
    rules=_RULES,
    dropped=_DROPPED,
)
