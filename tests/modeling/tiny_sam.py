"""A SAM as small as it gets, with random weights, in a folder as transformers writes it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

from tests.helpers import randomise

#: Pixels a side that it takes.
INPUT_SIZE = 64


def tiny_sam(seed: int = 3) -> nn.Module:
    """Large weights, so that points differ in their masks."""
    frame = {"image_size": INPUT_SIZE, "patch_size": 16}
    vision = SamVisionConfig(
        hidden_size=16,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        window_size=2,
        global_attn_indexes=[1],
        num_pos_feats=8,
        mlp_ratio=2.0,
        **frame,
    )
    prompts = SamPromptEncoderConfig(hidden_size=16, mask_input_channels=4, **frame)
    decoder = SamMaskDecoderConfig(hidden_size=16, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=16)
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    sam = randomise(SamModel(config), seed).eval()
    with torch.no_grad():
        for name, parameter in sam.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
            elif "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return sam


def write_tiny_sam(folder: Path, *, weights: bool = True) -> str:
    """The folder's name, for ``MODEL.OVSEG.PROPOSALS.SAM.NAME``."""
    sam = tiny_sam()
    sam.config.save_pretrained(folder)
    if weights:
        sam.save_pretrained(folder)
    return str(folder)
