"""SegFormer's encoder as a backbone."""

import pytest
import torch
from detectron2.modeling import build_backbone

from ovseg_d2.modeling.backbones.mix_transformer import PUBLIC, build_segformer
from tests.modeling.tiny_backbones import backbone_cfg

# Millions of parameters of the encoders (SegFormer's Table 6).
SIZES = {"b0": 3.4, "b1": 13.1, "b2": 24.2, "b3": 44.0, "b4": 60.8, "b5": 81.4}


@pytest.mark.parametrize("name", ["b0", "b4"])
def test_public_sizes(name):
    with torch.device("meta"):
        model = build_segformer(f"nvidia/mit-{name}", drop_path_rate=0.1)
    million = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert million == pytest.approx(SIZES[name], abs=0.15)
    assert f"nvidia/mit-{name}" in PUBLIC


def test_stochastic_depth(tmp_path):
    cfg = backbone_cfg("MixTransformer", tmp_path)
    cfg.MODEL.MIT.DROP_PATH_RATE = 0.4
    rates = [m.drop_prob for m in build_backbone(cfg).modules() if type(m).__name__ == "SegformerDropPath"]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_errors_name_their_keys(tmp_path, monkeypatch):
    cfg = backbone_cfg("MixTransformer", tmp_path)
    cfg.MODEL.MIT.NAME = "nvidia/mit-b9"
    with pytest.raises(FileNotFoundError, match="MODEL.MIT.NAME: nvidia/mit-b9/config.json .*nvidia/mit-b4"):
        build_backbone(cfg)
    (tmp_path / "config.json").write_text('{"model_type": "sam"}')
    cfg.MODEL.MIT.NAME = str(tmp_path)
    with pytest.raises(ValueError, match="MODEL.MIT.NAME: .*of type 'sam'; expected 'segformer'"):
        build_backbone(cfg)
    monkeypatch.setattr("ovseg_d2.modeling.layers.hub_model.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"MODEL.BACKBONE.NAME is 'MixTransformer', .*ovseg_d2\[mit\]"):
        build_backbone(cfg)
