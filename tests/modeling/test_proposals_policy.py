"""MODEL.OVSEG.PROPOSALS.TRAINABLE, and generators without a classifier."""

import pytest
import torch
from detectron2.modeling import build_model

from ovseg_d2.engine import load_parts
from tests.helpers import random_input
from tests.modeling.tiny_fcclip import fcclip_cfg

HEAD = "proposals.mask_decoder.class_embed."


@pytest.mark.parametrize("policy", ["full", "class_head"])
def test_what_trains(policy):
    cfg = fcclip_cfg()
    cfg.MODEL.OVSEG.PROPOSALS.TRAINABLE = policy
    model = build_model(cfg).train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    generator = {name for name, _ in model.named_parameters() if name.startswith("proposals.")}
    assert trainable == (generator if policy == "full" else {name for name in generator if name.startswith(HEAD)})
    assert model.proposals.pixel_decoder.training == (policy == "full")
    sum(model([random_input((64, 64), num_classes=5, num_masks=2)]).values()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trainable)


def test_unknown_policy():
    cfg = fcclip_cfg()
    cfg.MODEL.OVSEG.PROPOSALS.TRAINABLE = "heads"
    with pytest.raises(ValueError, match="PROPOSALS.TRAINABLE: got 'heads'; allowed are full, class_head, frozen"):
        build_model(cfg)


def test_a_generator_without_classes_starts_a_training(tmp_path):
    cfg = fcclip_cfg()
    model = build_model(cfg)
    masks = {k: v for k, v in model.state_dict().items() if k.startswith("proposals.") and not k.startswith(HEAD)}
    torch.save(masks, tmp_path / "masks.pth")
    clip = {k: v for k, v in model.state_dict().items() if k.startswith("clip.")}
    torch.save(clip, tmp_path / "clip.pth")

    cfg.MODEL.WEIGHTS = str(tmp_path / "clip.pth")
    cfg.MODEL.OVSEG.PROPOSALS.WEIGHTS = str(tmp_path / "masks.pth")
    other = build_model(cfg)
    load_parts(other, cfg, strict=False)
    assert all(torch.equal(other.state_dict()[k], v) for k, v in masks.items())
    with pytest.raises(ValueError, match="class_embed"):
        load_parts(other, cfg, strict=True)

    # The masks alone are whole where nothing else is asked for; a part of them never is.
    cfg.MODEL.OVSEG.PROPOSALS.WEIGHTS = str(tmp_path / "some.pth")
    torch.save(dict(list(masks.items())[:-1]), tmp_path / "some.pth")
    with pytest.raises(ValueError, match="does not fit"):
        load_parts(other, cfg, strict=False)
