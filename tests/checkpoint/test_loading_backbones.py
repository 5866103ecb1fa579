"""Weights of backbones that name them: from a file, a folder, or a checkpoint of the whole model, never none."""

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from transformers import SegformerConfig, SegformerModel

from ovseg_d2.checkpoint.io import save_atomic
from ovseg_d2.engine import load_parts
from ovseg_d2.modeling.clip.build import build_clip
from ovseg_d2.modeling.layers.position_embedding import resize_position_embedding
from tests.helpers import randomise
from tests.modeling.tiny_backbones import KINDS, backbone_cfg

KEYS = {
    "ClipResNetBackbone": "MODEL.OVSEG.CLIP.PRETRAINED",
    "ClipViTFPN": "MODEL.OVSEG.CLIP.PRETRAINED",
    "TimmViTFPN": "MODEL.TIMM_VIT_FPN.PRETRAINED",
    "MixTransformer": "MODEL.MIT.NAME",
}


def open_clip_weights(name: str) -> dict[str, torch.Tensor]:
    """Of both towers, random, as open_clip writes them."""
    clip = randomise(build_clip(name), seed=5)
    return {
        key.removeprefix("text.").replace("visual.tower.", "visual."): value for key, value in clip.state_dict().items()
    }


def write_weights(cfg: CfgNode, folder) -> dict[str, torch.Tensor]:
    """Weights for the backbone of a config, which names them then; names in the backbone -> tensors."""
    kind, path = cfg.MODEL.BACKBONE.NAME, str(folder / "weights.safetensors")
    if kind == "MixTransformer":
        model = randomise(SegformerModel(SegformerConfig.from_pretrained(cfg.MODEL.MIT.NAME)), seed=5)
        model.save_pretrained(cfg.MODEL.MIT.NAME)
        return {f"segformer.{name}": value for name, value in model.state_dict().items()}
    if kind == "TimmViTFPN":
        trunk = randomise(build_backbone(cfg), seed=5).trunk.state_dict()
        # What timm's own files have beside the blocks.
        extra = {"norm.weight": torch.ones(64), "norm.bias": torch.zeros(64), "head.weight": torch.zeros(10, 64)}
        save_atomic({**trunk, **extra}, path)
        cfg.MODEL.TIMM_VIT_FPN.PRETRAINED = path
        return {f"trunk.{name}": value for name, value in trunk.items()}
    weights = open_clip_weights(cfg.MODEL.OVSEG.CLIP.NAME)
    save_atomic(weights, path)
    cfg.MODEL.OVSEG.CLIP.PRETRAINED = path
    return {
        f"encoder.tower.{name.removeprefix('visual.')}": value
        for name, value in weights.items()
        if name.startswith("visual.") and "attnpool" not in name
    }


def built(cfg: CfgNode, seed=9):
    return randomise(build_model(cfg), seed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_starts_from_the_named_weights(kind, tmp_path):
    cfg = backbone_cfg(kind, tmp_path)
    expected = write_weights(cfg, tmp_path)
    model = built(cfg)
    load_parts(model, cfg, strict=False)
    own = model.proposals.backbone.state_dict()
    assert {name for name in own if not name.startswith("fpn")} == set(expected)
    for name, value in expected.items():
        assert torch.equal(own[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_none_is_an_error(kind, tmp_path):
    """A backbone with random weights would train for weeks, and nobody would know."""
    cfg = backbone_cfg(kind, tmp_path)
    with pytest.raises(ValueError, match=KEYS[kind]):
        load_parts(built(cfg), cfg, strict=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_checkpoint_needs_no_other_file(kind, tmp_path):
    """Not even where the config names weights that are not there."""
    cfg = backbone_cfg(kind, tmp_path)
    source = built(cfg, seed=1)
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    save_atomic(source.state_dict(), cfg.MODEL.WEIGHTS)
    cfg.MODEL.OVSEG.CLIP.PRETRAINED = cfg.MODEL.TIMM_VIT_FPN.PRETRAINED = str(tmp_path / "absent.pth")
    model = built(cfg)
    load_parts(model, cfg, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_needs_the_rest_of_the_model(kind, tmp_path):
    cfg = backbone_cfg(kind, tmp_path)
    write_weights(cfg, tmp_path)
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS is empty.*proposals.pixel_decoder"):
        load_parts(built(cfg), cfg, strict=True)


@pytest.mark.parametrize("kind", ["ClipResNetBackbone", "ClipViTFPN", "TimmViTFPN"])
def test_weights_of_another_architecture(kind, tmp_path):
    cfg = backbone_cfg(kind, tmp_path)
    expected = write_weights(cfg, tmp_path)
    other = {f"visual.{name.partition('tower.')[2]}": value for name, value in expected.items()}
    if kind == "TimmViTFPN":
        other = {name.removeprefix("trunk."): value for name, value in expected.items()}
    del other[next(name for name in other if name.endswith("weight"))]
    save_atomic(other, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"1 (missing|tensors differ), first .*weight") as error:
        load_parts(built(cfg), cfg, strict=False)
    assert "\n" not in str(error.value)


def test_mix_transformer_without_weights_in_its_folder(tmp_path):
    cfg = backbone_cfg("MixTransformer", tmp_path)
    with pytest.raises(ValueError, match="MODEL.MIT.NAME: cannot read the weights of .*mit") as error:
        load_parts(built(cfg), cfg, strict=False)
    assert "\n" not in str(error.value)


def test_frozen_batch_norms_take_clips_statistics(tmp_path):
    cfg = backbone_cfg("ClipResNetBackbone", tmp_path)
    cfg.MODEL.CLIP_RESNET.NORM = "FrozenBN"
    expected = write_weights(cfg, tmp_path)
    model = built(cfg)
    load_parts(model, cfg, strict=False)
    own = model.proposals.backbone.state_dict()
    assert set(own) == {name for name in expected if not name.endswith("num_batches_tracked")}
    assert all(torch.equal(value, expected[name]) for name, value in own.items())


def test_position_table_of_another_size(tmp_path):
    """DenseCLIP keeps one for images of 512 pixels; CLIP's is resized, bilinearly, when it is loaded."""
    cfg = backbone_cfg("ClipViTFPN", tmp_path)
    cfg.MODEL.CLIP_VIT_FPN.IMAGE_SIZE = 80
    expected = write_weights(cfg, tmp_path)["encoder.tower.positional_embedding"]
    model = built(cfg)
    load_parts(model, cfg, strict=False)
    table = model.proposals.backbone.encoder.tower.positional_embedding
    assert table.shape == (1 + 5 * 5, 32) and table.requires_grad
    assert torch.equal(table, resize_position_embedding(expected, (5, 5), mode="bilinear", align_corners=False))
    cfg.MODEL.CLIP_VIT_FPN.IMAGE_SIZE = 90
    with pytest.raises(ValueError, match="MODEL.CLIP_VIT_FPN.IMAGE_SIZE: got 90; expected a multiple .* 16"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("augreg", "'augreg' is no file and no tag of test_vit; expected one of r160_in1k"),
        ("/nowhere/vit.pth", "'/nowhere/vit.pth' is no file and no tag"),
    ],
)
def test_tags_of_timm(tmp_path, pretrained, message):
    cfg = backbone_cfg("TimmViTFPN", tmp_path)
    cfg.MODEL.TIMM_VIT_FPN.PRETRAINED = pretrained
    with pytest.raises(ValueError, match=f"MODEL.TIMM_VIT_FPN.PRETRAINED: {message}"):
        load_parts(built(cfg), cfg, strict=False)


def test_weights_of_timm_that_cannot_be_fetched(tmp_path, monkeypatch):
    cfg = backbone_cfg("TimmViTFPN", tmp_path)
    cfg.MODEL.TIMM_VIT_FPN.PRETRAINED = "r160_in1k"
    model = built(cfg)

    def no_network(*_, **__):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("ovseg_d2.modeling.backbones.timm_vit_fpn.timm.create_model", no_network)
    with pytest.raises(ValueError, match=r"could not be fetched \(OSError\); fetch .*timm/test_vit") as error:
        load_parts(model, cfg, strict=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["ClipResNetBackbone", "TimmViTFPN"])
def test_mta_clip_takes_the_text_tower_beside_the_backbone(kind, tmp_path):
    """One file of CLIP gives a CLIP backbone and the texts; another backbone has its own, and CLIP's texts."""
    cfg = backbone_cfg(kind, tmp_path)
    expected = write_weights(cfg, tmp_path)
    weights = open_clip_weights(cfg.MODEL.OVSEG.CLIP.NAME)
    cfg.MODEL.OVSEG.CLIP.PRETRAINED = str(tmp_path / "clip.safetensors")
    save_atomic(weights, cfg.MODEL.OVSEG.CLIP.PRETRAINED)
    cfg.MODEL.META_ARCHITECTURE = "MTACLIP"
    cfg.MODEL.OVSEG.MTA_CLIP.CONTEXT_LENGTH, cfg.MODEL.OVSEG.MTA_CLIP.TEXT_LENGTH = 2, 7
    model = built(cfg)
    load_parts(model, cfg, strict=False)
    assert model.clip.visual is None
    for name, value in model.clip.text.state_dict().items():
        assert torch.equal(value, weights[name]), name
    own = model.proposals.backbone.state_dict()
    assert all(torch.equal(own[name], value) for name, value in expected.items())
