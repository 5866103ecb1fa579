"""Weights from files into models: what fits, what is listed, what is refused."""

import logging

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from ovseg_d2.checkpoint.io import save_atomic
from ovseg_d2.checkpoint.matching import describe_groups, match_state_dict
from ovseg_d2.engine import load_parts
from tests.helpers import randomise, tiny_cfg
from tests.modeling.test_mask2former import to_public_names


@pytest.fixture(scope="module")
def source():
    return randomise(build_model(tiny_cfg()), seed=1)


def load(tmp_path, state_dict, *, strict, suffix=".pth", num_classes=5, **opts):
    path = tmp_path / f"weights{suffix}"
    save_atomic(state_dict, path)
    cfg = tiny_cfg(num_classes=num_classes)
    cfg.MODEL.WEIGHTS = str(path)
    model = build_model(cfg)
    load_parts(model, cfg, strict=strict)
    return model


def assert_same(model, source, prefix=""):
    for name, value in source.state_dict().items():
        if name.startswith(prefix):
            torch.testing.assert_close(model.state_dict()[name], value)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_own_and_public_files(tmp_path, source, strict, suffix):
    own = source.state_dict()
    assert_same(load(tmp_path, own, strict=strict, suffix=suffix), source)
    assert_same(load(tmp_path, to_public_names(own), strict=strict, suffix=suffix), source)


def test_backbone_file_finds_its_place(tmp_path, source, caplog):
    prefix = "proposals.backbone."
    names = {k: v for k, v in source.state_dict().items() if k.startswith(prefix)}
    with caplog.at_level(logging.INFO):
        model = load(tmp_path, {k.removeprefix(prefix): v for k, v in names.items()}, strict=False)
    assert_same(model, source, prefix)
    assert "under proposals.backbone" in caplog.text
    assert "initial values kept: proposals.pixel_decoder" in caplog.text


def test_other_class_count(tmp_path, source, caplog):
    with caplog.at_level(logging.INFO):
        model = load(tmp_path, source.state_dict(), strict=False, num_classes=7)
    assert_same(model, source, "proposals.backbone.")
    assert "shapes differ, initial values kept: proposals.mask_decoder.class_embed.bias" in caplog.text
    with pytest.raises(ValueError, match=r"class_embed.bias is \(6,\) in the file, \(8,\) in the model"):
        load(tmp_path, source.state_dict(), strict=True, num_classes=7)


@pytest.mark.parametrize("strict", [True, False])
def test_another_architecture(tmp_path, strict):
    other = {"encoder.weight": torch.ones(3), "head.bias": torch.ones(2)}
    with pytest.raises(ValueError, match="0 of .* tensors match") as error:
        load(tmp_path, other, strict=strict)
    assert "weights.pth matches no known format; its first 2 keys: encoder.weight, head.bias" in str(error.value)
    assert "formats tried: this project's own, " in str(error.value) and "\n" not in str(error.value)


def test_strict_wants_every_tensor(tmp_path, source):
    part = {k: v for k, v in source.state_dict().items() if "decoder_norm" not in k}
    with pytest.raises(ValueError, match="2 missing, expected for example proposals.mask_decoder.decoder_norm"):
        load(tmp_path, part, strict=True)
    cfg = tiny_cfg()
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        load_parts(build_model(cfg), cfg, strict=True)
    cfg.MODEL.WEIGHTS = str(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load_parts(build_model(cfg), cfg, strict=True)


def test_weights_of_the_generator_alone(tmp_path, source):
    path = tmp_path / "generator.safetensors"
    save_atomic(source.state_dict(), path)
    cfg = tiny_cfg()
    cfg.MODEL.OVSEG.PROPOSALS.WEIGHTS = str(path)
    model = build_model(cfg)
    load_parts(model, cfg, strict=False)
    assert_same(model, source, "proposals.")


def test_pickles_need_the_flag(tmp_path, source):
    import pickle

    path = tmp_path / "zoo.pkl"
    arrays = {name: np.asarray(value) for name, value in to_public_names(source.state_dict()).items()}
    path.write_bytes(pickle.dumps({"model": arrays}))
    cfg = tiny_cfg()
    cfg.MODEL.WEIGHTS = str(path)
    model = build_model(cfg)
    with pytest.raises(ValueError, match="CHECKPOINT.ALLOW_PICKLE True"):
        load_parts(model, cfg, strict=True)
    cfg.CHECKPOINT.ALLOW_PICKLE = True
    load_parts(model, cfg, strict=True)
    assert_same(model, source)


def test_groups_in_messages():
    names = ["a.b.c.weight", "a.b.c.bias", "a.b.d", "a.b.e", "x.weight", "top"]
    assert describe_groups(names) == "a.b 4 (c.weight, c.bias, d, ...), x 1 (weight), top level 1 (top)"


def test_match_counts(source):
    state = dict(source.state_dict())
    state["surplus.weight"] = torch.ones(1)
    match = match_state_dict(source, state, source="file")
    assert match.unexpected == ["surplus.weight"] and match.missing == [] and not match.complete
    assert "in the file, not in the model: surplus 1 (weight)" in match.summary()
