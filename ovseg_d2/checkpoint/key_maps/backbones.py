"""Files of backbones alone; where the backbone stands in a model is found when they are loaded."""

from __future__ import annotations

from ovseg_d2.checkpoint.key_maps.base import KeyMap, starting_with

TORCHVISION_RESNET = KeyMap(
    name="torchvision ResNet",
    recognises=starting_with("layer1.0.conv1."),
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
    recognises=starting_with("layers.0.blocks.0.attn.relative_position_bias_table"),
    rules=(),
    # Classification files have one norm at the end; segmentation models have one an output, norm0 to norm3.
    dropped=r"^(head|norm)\.|\.(relative_position_index|attn_mask)$",
)
