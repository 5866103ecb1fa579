"""tools/analyze_model.py counts what is there, and texts apart from images."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from tests.modeling.tiny_backbones import backbone_cfg

PATH = Path(__file__).resolve().parents[1] / "tools" / "analyze_model.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("analyze_model", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mta_cfg(folder):
    cfg = backbone_cfg("ClipResNetBackbone", folder)
    # Names are read, so that the text tower must know all of the tokenizer's words, and numbers take many of them.
    cfg.MODEL.OVSEG.CLIP.NAME = "OVShapes-RN"
    cfg.MODEL.OVSEG.MTA_CLIP.CONTEXT_LENGTH, cfg.MODEL.OVSEG.MTA_CLIP.TEXT_LENGTH = 2, 8
    return cfg


def analyze(tool, cfg, size=(64, 96)):
    torch.manual_seed(0)
    return tool.analyze(build_model(cfg), size=size, num_classes=5)


def test_parameters_and_multiply_adds(tool, tmp_path):
    cfg = backbone_cfg("ClipResNetBackbone", tmp_path)
    cfg.MODEL.CLIP_RESNET.NORM = "FrozenBN"
    numbers = analyze(tool, cfg)
    model = build_model(cfg)
    assert numbers[""]["params"] == sum(p.numel() for p in model.parameters()) == numbers[""]["trainable"]
    parts = [numbers[f"proposals.{name}"] for name in ("backbone", "pixel_decoder", "mask_decoder")]
    for key in ("params", "macs", "activations"):
        assert sum(part[key] for part in parts) == pytest.approx(numbers["proposals"][key], rel=1e-3), key
        assert all(part[key] > 0 for part in parts)
    # The first convolution: 3 x 3 x 3 weights for each of its channels, at half the resolution.
    conv = numbers["proposals.backbone.encoder.tower.conv1"]
    assert conv["macs"] == conv["params"] * 32 * 48
    assert conv["activations"] == conv["params"] / 27 * 32 * 48
    larger = analyze(tool, cfg, size=(128, 96))["proposals.backbone"]
    assert larger["macs"] == pytest.approx(2 * numbers["proposals.backbone"]["macs"], rel=1e-6)


def test_mta_clip_beside_its_baseline(tool, tmp_path):
    cfg = mta_cfg(tmp_path)
    baseline = analyze(tool, cfg)
    cfg.MODEL.META_ARCHITECTURE = "MTACLIP"
    model = analyze(tool, cfg)
    assert {p: v for p, v in model.items() if p.startswith("proposals.backbone")} == {
        p: v for p, v in baseline.items() if p.startswith("proposals.backbone")
    }
    assert model["proposals"]["params"] == baseline["proposals"]["params"]
    assert model["proposals.mask_decoder"]["macs"] > baseline["proposals.mask_decoder"]["macs"]
    text = model[tool.TEXT]
    assert text["macs"] > 0 and text["trainable"] == 0 < model["context_prompts"]["trainable"]
    assert model["clip"]["macs"] == text["macs"] and model["clip"]["activations"] == text["activations"]
    report = tool.report(model, 2)
    assert f"{(model['']['macs'] - text['macs']) / 1e9:.2f}" in report.splitlines()[-2]
    assert report.splitlines()[-1].startswith("text tower, once a vocabulary")
    assert "text tower" not in tool.report(baseline, 2)
