"""Every tensor of public FGA-seg and CAT-Seg models has its place in ours, and nothing in ours is without one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

import ovseg_d2.data
import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.checkpoint.convert import clip_part, convert_state_dict
from ovseg_d2.engine.load_config import load_config

ROOT = Path(__file__).resolve().parents[2]
LISTS = Path(__file__).parent / "state_dicts"
CONFIGS = {
    "B_no_fast_cat": "fga_seg/coco_stuff_ViTB16.yaml",
    "B_fast_cat": "fga_seg/coco_stuff_ViTB16_fast.yaml",
    "L_no_fast_cat": "fga_seg/coco_stuff_ViTL14.yaml",
}
# What FGA-seg adds to CAT-Seg.
ADDITIONS = re.compile(
    r"\.predictor\.(DCDT|proj)\.|\.transformer\.(conv2|conv_cat|corr_local_decoder_projection|Local_align)"
)


def public_names(name: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for line in (LISTS / f"fga_seg_{name}.txt").read_text().splitlines():
        key, numbers = re.fullmatch(r"(\S+) \(([\d, ]*)\) \w+", line).groups()
        tensors[key] = torch.empty([int(n) for n in numbers.split(",") if n.strip()], device="meta")
    return tensors


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def model_shapes(config: str) -> dict[str, tuple[int, ...]]:
    cfg = load_config(ROOT / "configs" / config, ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        return shapes(build_model(cfg).state_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_fga_seg(name):
    public = public_names(name)
    masks = [key for key in public if key.endswith("block_2.attn_mask")]  # computed here
    converted, message = convert_state_dict(public)
    assert len(masks) == 2 and len(converted) == len(public) - 2
    assert message.startswith(f"public FGA-seg: {len(converted)} keys renamed, 2 without counterpart")
    assert shapes(converted) == model_shapes(CONFIGS[name])


@pytest.mark.parametrize(("name", "config"), [("B", "ViTB16"), ("L", "ViTL14")])
def test_cat_seg(name, config):
    public = {key: t for key, t in public_names(f"{name}_no_fast_cat").items() if not ADDITIONS.search(key)}
    assert len([key for key in public if key.startswith("sem_seg_head.predictor.transformer.")]) == 130
    converted, message = convert_state_dict(public)
    assert message.startswith(f"public CAT-Seg: {len(public) - 2} keys renamed")
    assert shapes(converted) == model_shapes(f"cat_seg/coco_stuff_{config}.yaml")


def test_the_clip_in_a_file_of_cat_seg():
    public = public_names("B_no_fast_cat")
    clip = clip_part(public)
    assert len(clip) == len([key for key in public if ".clip_model." in key])
    assert {name.split(".")[0] for name in clip} == {"visual", "text", "logit_scale"}
