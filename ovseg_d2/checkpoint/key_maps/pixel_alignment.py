"""Official names of what FGA-seg adds around CAT-Seg: P2Tformer, text-to-pixel projection, local similarity."""

from __future__ import annotations

from ovseg_d2.checkpoint.key_maps.base import Rules

_PREDICTOR = r"^sem_seg_head\.predictor\."

ALIGNMENT_RULES: Rules = (
    (rf"{_PREDICTOR}DCDT\.gamma_text$", "text_alignment.residual_scale"),
    (rf"{_PREDICTOR}DCDT\.gamma_vision$", "text_alignment.pixel_residual_scale"),
    (rf"{_PREDICTOR}DCDT\.cross_atten_text\.", "text_alignment.layers."),
    (rf"{_PREDICTOR}DCDT\.cross_atten_vision\.", "text_alignment.pixel_layers."),
    (r"^(text_alignment\.\w+\.\d+)\.multihead_attn\.", r"\1.attn."),
    (r"^(text_alignment\.\w+\.\d+)\.MLP\.", r"\1.proj."),
    (rf"{_PREDICTOR}proj\.vis\.1\.0\.", "text_projection.conv1."),
    (rf"{_PREDICTOR}proj\.vis\.1\.1\.", "text_projection.norm1."),
    (rf"{_PREDICTOR}proj\.vis\.3\.0\.", "text_projection.conv2."),
    (rf"{_PREDICTOR}proj\.vis\.3\.1\.", "text_projection.norm2."),
    (rf"{_PREDICTOR}proj\.vis\.4\.", "text_projection.out."),
    (rf"{_PREDICTOR}proj\.txt\.", "text_projection.text_kernels."),
    (rf"{_PREDICTOR}transformer\.Local_align\.txt\.", "cost_head.similarity.text_kernels."),
)
