"""ZegFormer, ZSSeg, OVSeg, FreeSeg and MAFT: a mask generator beside OpenAI's CLIP."""

from __future__ import annotations

from ovseg_d2.checkpoint.key_maps.base import KeyMap, Rules, starting_with
from ovseg_d2.checkpoint.key_maps.mask2former import DROPPED, MASK2FORMER_RULES, MASKFORMER_RULES

_CLASS_HEAD = "proposals.mask_decoder.class_embed."


def clip_rules(place: str) -> Rules:
    """A whole CLIP, whose names are open_clip's: the image tower under visual., the text tower's parts at the top."""
    return (
        (rf"^{place}visual\.", "clip.visual.tower."),
        (rf"^{place}logit_scale$", "clip.logit_scale"),
        (rf"^{place}", "clip.text."),
    )


_ADAPTER_RULES: Rules = (
    # Mask prompts, which OVSeg keeps in CLIP's image tower.
    (r"^clip_adapter\.clip_model\.visual\.mask_embedding$", "mask_prompts.embeddings"),
    *clip_rules(r"clip_adapter\.clip_model\."),
    # ZSSeg's VOC models have a second adapter for the regions; then only this one has learned prompts.
    (r"^(clip_adapter|_region_clip_adapter)\.prompt_learner\.", "prompts."),
    (r"^clip_adapter\.non_object_embedding$", f"{_CLASS_HEAD}void_embedding.weight"),
)
_CLASS_MLP_RULES: Rules = ((r"^sem_seg_head\.predictor\.class_embed\.layers\.", f"{_CLASS_HEAD}mlp.layers."),)
_INTERACTION_RULES: Rules = (
    (r"^sem_seg_head\.interaction\.layer_norm_q_1\.", "proposals.interaction.query_norm."),
    (r"^sem_seg_head\.interaction\.layer_norm_k_1\.", "proposals.interaction.text_norm."),
    (r"^sem_seg_head\.interaction\.", "proposals.interaction."),
)
# The adapter's pixel statistics are constants, its signals rows of the token table (SOT, full stop, EOT, padding). The
# region adapter's CLIP is the pretrained one again, its row of "no object" is never used.
_ADAPTER_DROPPED = (
    rf"{DROPPED}|^clip_adapter\.pixel_(mean|std)$|\.prompt_learner\.\w+_signal$"
    r"|^_region_clip_adapter\.(clip_model\.|pixel_|non_object_embedding$)"
)

ZEGFORMER = KeyMap(
    name="public ZegFormer",
    recognises=starting_with("sem_seg_head.predictor.bg_feature"),
    rules=(
        # Files of training lack CLIP.
        *clip_rules(r"sem_seg_head\.predictor\.clip_model\."),
        (r"^sem_seg_head\.predictor\.bg_feature$", f"{_CLASS_HEAD}void_embedding.weight"),
        (r"^sem_seg_head\.predictor\.logit_scale$", f"{_CLASS_HEAD}logit_scale"),
        (r"^sem_seg_head\.predictor\.projection_layer\.", f"{_CLASS_HEAD}mlp.layers.0."),
        *MASKFORMER_RULES,
    ),
    dropped=DROPPED,
)
ZSSEG = KeyMap(
    name="public ZSSeg",
    recognises=starting_with("sem_seg_head.predictor.transformer.decoder.", "clip_adapter."),
    rules=(*_ADAPTER_RULES, *_CLASS_MLP_RULES, *MASKFORMER_RULES),
    dropped=_ADAPTER_DROPPED,
)
OVSEG = KeyMap(
    name="public OVSeg",
    recognises=starting_with("sem_seg_head.predictor.", "clip_adapter.clip_model.visual.mask_embedding"),
    rules=ZSSEG.rules,
    dropped=_ADAPTER_DROPPED,
)
FREESEG = KeyMap(
    name="public FreeSeg",
    recognises=starting_with("sem_seg_head.interaction."),
    rules=(*_ADAPTER_RULES, *_CLASS_MLP_RULES, *_INTERACTION_RULES, *MASK2FORMER_RULES),
    dropped=_ADAPTER_DROPPED,
)
MAFT = KeyMap(
    name="public MAFT",
    recognises=starting_with("IPCLIP."),
    rules=((r"^IPCLIP\.", "ip_clip.tower."), *FREESEG.rules),
    # A third copy of CLIP's image tower, which nothing uses.
    dropped=rf"{_ADAPTER_DROPPED}|^T\.",
)
# Learned prompts of ZSSeg or FreeSeg, in files of their own or of the prompt training, where CLIP is with them.
PROMPTS = KeyMap(
    name="public prompts",
    recognises=starting_with("clip_adapter.prompt_learner."),
    rules=_ADAPTER_RULES,
    dropped=_ADAPTER_DROPPED,
)
