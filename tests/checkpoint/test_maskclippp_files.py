"""Public MaskCLIP++ files, of every kind of CLIP, and CLIPs that other methods tuned; layouts are written by hand."""

import logging
import re
from copy import deepcopy

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ovseg_d2.checkpoint.convert import clip_part, convert_state_dict
from ovseg_d2.checkpoint.io import save_atomic
from ovseg_d2.engine import load_parts
from ovseg_d2.modeling.clip import build
from ovseg_d2.modeling.clip.trainable import _SPLIT_NAMES as SPLIT
from tests.helpers import random_input, randomise, tiny_cfg
from tests.modeling.clip.tiny_clip import RESNET, convnext_config, write_config
from tests.modeling.clip.tiny_vit import eva_tower

TEXT = {"context_length": 24, "vocab_size": 0, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 4, "width": 16, "head_width": 8, "patch_size": 8}
EVA = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None, "image_size": 56}
#: The image tower's configuration, the similarity, and whether the text tower was tuned.
KINDS = {
    "convnext": (convnext_config()["vision_cfg"], "pseudo_text", False),
    "resnet": (RESNET["vision_cfg"], "linear", False),
    "vit": (VIT, "linear", True),
    "eva02": (EVA, "linear", True),
    "eva01": (EVA, "linear", False),
}


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    """A kind of CLIP; EVA's tiny towers are no named models of timm, so they are put in place of one."""
    if request.param.startswith("eva"):
        original = build._open_clip_model

        def with_tiny_eva(name: str) -> nn.Module:
            model = original(name)
            model.visual = eva_tower(rope=request.param == "eva02")
            return model

        monkeypatch.setattr(build, "_open_clip_model", with_tiny_eva)
    return request.param


def make_cfg(tmp_path, kind: str, meta_architecture: str = "MaskCLIPpp") -> CfgNode:
    vision, similarity, _ = KINDS[kind]
    cfg = tiny_cfg(tasks=["semantic"])
    cfg.MODEL.META_ARCHITECTURE, cfg.INPUT.FORMAT = meta_architecture, "RGB"
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": TEXT}
    if kind.startswith("eva"):
        config["custom_text"] = True
    ovseg = cfg.MODEL.OVSEG
    ovseg.CLIP.NAME, ovseg.CLIP.PRETRAINED = write_config(tmp_path, deepcopy(config)), ""
    ovseg.TEXT.TEMPLATES = ["a photo of a {}.", "a {} here"]
    ovseg.PROPOSALS.NAME = "GroundTruthProposals"
    ovseg.MASKCLIPPP.SIMILARITY, ovseg.MASKCLIPPP.WIDTH, ovseg.MASKCLIPPP.PSEUDO_TEXT.HEADS = similarity, 5, 2
    return cfg


def make(cfg: CfgNode, seed: int) -> nn.Module:
    model = randomise(build_model(cfg), seed).eval()
    with torch.no_grad():
        model.clip.logit_scale.fill_(3.0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.add_(1.0)
    return model


def official_names(model: nn.Module, kind: str, *, text: bool) -> dict[str, torch.Tensor]:
    """The public code's names, written down independently of the conversion."""
    renamed = {}
    tower = {
        ".attn.norm.": ".attn.inner_attn_ln.",
        ".mlp.norm.": ".mlp.ffn_ln.",
        ".mlp.fc1_g.": ".mlp.w1.",
        ".mlp.fc1_x.": ".mlp.w2.",
        ".attn.q_proj.bias": ".attn.q_bias",
        ".attn.v_proj.bias": ".attn.v_bias",
        **({".mlp.fc2.": ".mlp.w3."} if kind == "eva02" else {}),
    }
    for name, value in model.clip.visual.tower.state_dict().items():
        if kind.startswith("eva"):
            name = name.removeprefix("trunk.")
            for ours, theirs in tower.items():
                name = name.replace(ours, theirs)
        renamed[f"visual_encoder.proxy.{name}"] = value
    if kind != "convnext":
        renamed["visual_encoder.mask_logit_scale"] = model.clip.visual.mask_logit_scale.detach()
    if kind.startswith("eva"):
        renamed["visual_encoder.proxy.blocks.0.attn.rope.freqs_cos"] = torch.zeros(2)
    psm = {"expand": "corr_proj_in.0", "reduce": "corr_proj_out.0", "attn": "img2text", "norm": "ln_1"}
    for name, value in model.similarity.state_dict().items():
        first, _, rest = name.partition(".")
        renamed[f"psm.{psm.get(first, first)}.{rest}"] = value
    if text:
        prefix = "text_encoder.proxy." if kind.startswith("eva") else "text_encoder."
        renamed |= {f"{prefix}{name}": value for name, value in model.clip.text.state_dict().items()}
        renamed["text_encoder.logit_scale"] = model.clip.logit_scale.detach()
    return renamed


def open_clip_names(clip: nn.Module) -> dict[str, torch.Tensor]:
    """Both towers as open_clip writes them, without what a method adds."""
    return {
        name.removeprefix("text.").replace("visual.tower.", "visual."): value
        for name, value in clip.state_dict().items()
        if name != "visual.mask_logit_scale"
    }


def load(tmp_path, cfg: CfgNode, *, weights=None, clip=None, strict=True) -> nn.Module:
    """A model of other random weights, with those of the given dicts loaded."""
    for node, key, state_dict in ((cfg.MODEL, "WEIGHTS", weights), (cfg.MODEL.OVSEG.CLIP, "PRETRAINED", clip)):
        if state_dict is not None:
            node[key] = str(tmp_path / f"{key}.pth")
            save_atomic(state_dict, node[key])
    model = make(cfg, seed=9)
    load_parts(model, cfg, strict=strict)
    return model.eval()


def batch() -> list[dict]:
    inputs = [random_input(size, num_classes=5, num_masks=3, seed=i) for i, size in enumerate([(48, 72), (56, 41)])]
    return [{**x, "proposals": x["instances"].gt_masks.tensor} for x in inputs]


@torch.no_grad()
def assert_same_results(model: nn.Module, source: nn.Module) -> None:
    for found, expected in zip(model(batch()), source(batch()), strict=True):
        torch.testing.assert_close(found["sem_seg"], expected["sem_seg"])
        assert float(expected["sem_seg"].std()) > 0


@pytest.mark.parametrize("strict", [True, False])
def test_public_files(tmp_path, kind, strict, caplog):
    cfg = make_cfg(tmp_path, kind)
    source, text = make(cfg, seed=1), KINDS[kind][2]
    official = official_names(source, kind, text=text)
    assert all(name.startswith(("visual_encoder.", "psm.", "text_encoder.")) for name in official)
    message = convert_state_dict(official)[1]
    assert {"eva01": "on EVA-01", "eva02": "on EVA-02"}.get(kind, "public MaskCLIP++: ") in message
    with caplog.at_level(logging.INFO):
        model = load(
            tmp_path, cfg, weights=official, clip=None if text else open_clip_names(source.clip), strict=strict
        )
    # A text tower that was not tuned is that of the pretrained CLIP, whose image tower lies under the tuned one.
    own, expected = model.state_dict(), source.state_dict()
    assert own.keys() == expected.keys() and all(torch.equal(own[name], expected[name]) for name in expected)
    assert "initial values kept" not in caplog.text and "not in the model" not in caplog.text
    assert_same_results(model, source)


def test_a_frozen_text_tower_must_come_from_somewhere(tmp_path):
    cfg = make_cfg(tmp_path, "resnet")
    official = official_names(make(cfg, seed=1), "resnet", text=False)
    with pytest.raises(ValueError, match="CLIP.PRETRAINED is empty and MODEL.WEIGHTS does not hold CLIP.*clip.text"):
        load(tmp_path, cfg, weights=official)


def catseg_names(clip: nn.Module) -> dict[str, torch.Tensor]:
    """CAT-Seg's: OpenAI's names, the weights of queries, keys and values each for itself, and a head."""
    renamed = {
        "upsample1.weight": torch.zeros(2),
        "sem_seg_head.predictor.transformer.layers.0.swin_block.block_1.norm1.weight": torch.zeros(2),
    }
    for name, value in open_clip_names(clip).items():
        parts = {name: value}
        if name.endswith("in_proj_weight"):
            parts = dict(zip((name.replace("in_proj_weight", part) for part in SPLIT), value.chunk(3), strict=True))
        renamed |= {f"sem_seg_head.predictor.clip_model.{part}": tensor for part, tensor in parts.items()}
    return renamed


def maft_plus_names(clip: nn.Module) -> dict[str, torch.Tensor]:
    return {
        "cdt.cross_atten.norm.weight": torch.zeros(2),
        "sem_seg_head.pixel_decoder.mask_features.weight": torch.zeros(2),
        "void_embedding.weight": torch.zeros(1, 2),
        **{f"backbone.clip_model.{name}": value for name, value in open_clip_names(clip).items()},
    }


@pytest.mark.parametrize("key", ["weights", "clip"])
@pytest.mark.parametrize(("kind_", "names"), [("vit", catseg_names), ("convnext", maft_plus_names)])
def test_clips_of_other_methods(tmp_path, kind_, names, key):
    """Table 7: without a similarity of its own, a model takes the CLIP alone."""
    cfg = make_cfg(tmp_path, kind_)
    cfg.MODEL.OVSEG.MASKCLIPPP.SIMILARITY, cfg.MODEL.OVSEG.MASKCLIPPP.LEARN_ALPHA = "cosine", False
    source = make(cfg, seed=1)
    assert_same_results(load(tmp_path, cfg, **{key: names(source.clip)}), source)


def test_positions_of_another_grid(tmp_path, caplog):
    cfg = make_cfg(tmp_path, "vit")
    cfg.MODEL.OVSEG.MASKCLIPPP.SIMILARITY, cfg.MODEL.OVSEG.MASKCLIPPP.LEARN_ALPHA = "cosine", False
    source = make(cfg, seed=1)
    official = catseg_names(source.clip)
    name = next(name for name in official if name.endswith("visual.positional_embedding"))
    table = torch.arange(36.0).expand(16, 36).T  # a plane, which no resizing bends far from the border
    official[name] = torch.cat([official[name][:1], table])
    model = load(tmp_path, cfg, clip=official)
    found = model.clip.visual.tower.positional_embedding
    assert "6 x 6 positions in the file, resized to the model's 4 x 4" in caplog.text
    assert torch.equal(found[0], official[name][0])
    assert float(found[1:].mean()) == pytest.approx(float(table.mean()), abs=0.1)
    official[name] = official[name][:30]  # no square
    with pytest.raises(ValueError, match=re.escape("visual.positional_embedding: (30, 16) in the file, (17, 16)")):
        load(tmp_path, cfg, clip=official)


def test_clip_part(tmp_path):
    model = make(make_cfg(tmp_path, "vit"), seed=1)
    towers = {name for name in model.clip.state_dict() if name != "visual.mask_logit_scale"}
    assert clip_part(model.state_dict()).keys() == towers
    assert clip_part(official_names(model, "vit", text=True)).keys() == towers
    plain = open_clip_names(model.clip)
    assert clip_part(plain) == plain


# ---- a tuned CLIP in the training-free methods (Table 8)


def free_model(tmp_path, weights, **free):
    cfg = make_cfg(tmp_path, "vit", "TrainingFree")
    cfg.MODEL.OVSEG.TEXT.TEMPLATES = ["a {} here"]
    for key, value in free.items():
        cfg.MODEL.OVSEG.TRAINING_FREE[key] = value
    return load(tmp_path, cfg, weights=weights)


@pytest.mark.parametrize("layout", ["ours", "public"])
def test_tuned_clip_classifies_pixels(tmp_path, layout, caplog):
    tuned = make(make_cfg(tmp_path, "vit"), seed=1)
    weights = tuned.state_dict() if layout == "ours" else official_names(tuned, "vit", text=True)
    with caplog.at_level(logging.INFO):
        model = free_model(tmp_path, weights, CLASSIFY="dense", LAST_BLOCK="clearclip")
    assert "no use here for" in caplog.text and "similarity" in caplog.text and "mask_logit_scale" in caplog.text
    own, expected = model.state_dict(), tuned.state_dict()
    assert own and all(torch.equal(own[name], expected[name]) for name in own)
    with torch.no_grad():
        assert model(batch())[0]["sem_seg"].isfinite().all()


@pytest.mark.parametrize("layout", ["ours", "public"])
def test_tuned_clip_classifies_masks(tmp_path, layout):
    """As it does without its similarity, with the scale of mask tokens that it learned.

    With several templates the means of their texts would differ in length, and the two resize positions in other ways.
    """
    cfg = make_cfg(tmp_path, "vit")
    cfg.MODEL.OVSEG.TEXT.TEMPLATES = ["a {} here"]
    cfg.MODEL.OVSEG.MASKCLIPPP.SIMILARITY_AT_TEST = False
    tuned = make(cfg, seed=1)
    weights = tuned.state_dict() if layout == "ours" else official_names(tuned, "vit", text=True)
    model = free_model(tmp_path, weights, CLASSIFY="masks", MASK_MODE="maskclippp")
    assert torch.equal(model.clip.visual.mask_logit_scale, tuned.clip.visual.mask_logit_scale)
    model.clip.visual.pos_align_corners = True
    with torch.no_grad():
        found, expected = model(batch())[0]["sem_seg"], tuned(batch())[0]["sem_seg"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_a_clip_that_nobody_tuned_has_no_scale(tmp_path, caplog):
    source = make(make_cfg(tmp_path, "vit"), seed=1)
    cfg = make_cfg(tmp_path, "vit", "TrainingFree")
    cfg.MODEL.OVSEG.TRAINING_FREE.MASK_MODE = "maskclippp"
    cfg.MODEL.OVSEG.CLIP.PRETRAINED = str(tmp_path / "clip.pth")
    save_atomic(open_clip_names(source.clip), cfg.MODEL.OVSEG.CLIP.PRETRAINED)
    model = build_model(cfg)
    load_parts(model, cfg, strict=True)
    assert (model.clip.visual.mask_logit_scale == -5.0).all() and not model.clip.visual.mask_logit_scale.requires_grad
    assert "in no file, filled in from the pretrained CLIP or the config: clip.visual 1" in caplog.text
