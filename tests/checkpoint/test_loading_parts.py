"""Weights of hosts and of MAFT: two stages, a copy of CLIP that no file has, a generator with a CLIP of its own."""

import logging

import pytest
import torch
from detectron2.modeling import build_model

from ovseg_d2.checkpoint.io import save_atomic
from ovseg_d2.engine import load_parts
from tests.modeling.tiny_hosts import host_cfg, host_inputs, maft_cfg, random_host, sem_seg

COPIED = "in no file, filled in from the pretrained CLIP or the config: ip_clip"


@pytest.fixture(scope="module")
def stage_one():
    return random_host(host_cfg(), seed=1)


@pytest.fixture(scope="module")
def maft():
    return random_host(maft_cfg("MaskFormerProposals"), seed=2)


def open_clip_names(clip):
    """CLIP's weights as open_clip writes them."""
    return {
        name.removeprefix("text.").replace("visual.tower.", "visual."): value
        for name, value in clip.state_dict().items()
    }


def part(model, *prefixes):
    return {name: value for name, value in model.state_dict().items() if name.startswith(prefixes)}


def load(tmp_path, cfg, *, strict=True, **files):
    """A model of other random weights, with those of the given dicts loaded: weights, clip, proposals, own_clip."""
    ovseg = cfg.MODEL.OVSEG
    places = {
        "weights": (cfg.MODEL, "WEIGHTS"),
        "clip": (ovseg.CLIP, "PRETRAINED"),
        "proposals": (ovseg.PROPOSALS, "WEIGHTS"),
        "own_clip": (ovseg.PROPOSALS, "CLIP_PRETRAINED"),
    }
    for name, state_dict in files.items():
        node, key = places[name]
        node[key] = str(tmp_path / f"{name}.pth")
        save_atomic(state_dict, node[key])
    model = random_host(cfg, seed=9)
    load_parts(model, cfg, strict=strict)
    return model


def assert_same(model, source, prefix="", *, own_prefix=None):
    """The tensors of ``source`` under ``prefix`` are those of ``model`` under ``own_prefix``."""
    own, expected = model.state_dict(), part(source, prefix)
    assert expected
    for name, value in expected.items():
        name = name if own_prefix is None else own_prefix + name.removeprefix(prefix)
        assert torch.equal(own[name], value), name


@pytest.mark.parametrize("strict", [True, False])
def test_ip_clip_starts_as_the_pretrained_clip(tmp_path, stage_one, strict, caplog):
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path, maft_cfg(), strict=strict, clip=open_clip_names(stage_one.clip))
    assert_same(model, stage_one, "clip.")
    assert_same(model, stage_one, "clip.visual.tower.", own_prefix="ip_clip.tower.")
    assert COPIED in caplog.text


@pytest.mark.parametrize("strict", [True, False])
def test_a_file_with_ip_clip_wins(tmp_path, stage_one, maft, strict, caplog):
    """Its own CLIP, or the pretrained one, is the teacher's alone."""
    cfg = maft_cfg("MaskFormerProposals")
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path, cfg, strict=strict, weights=maft.state_dict())
        assert_same(model, maft)
        weights = part(maft, "ip_clip.", "proposals.")
        model = load(tmp_path, cfg, strict=strict, weights=weights, clip=open_clip_names(stage_one.clip))
    assert_same(model, maft, "ip_clip.")
    assert_same(model, stage_one, "clip.")
    assert COPIED not in caplog.text


@pytest.mark.parametrize("strict", [True, False])
def test_stage_one_as_the_model(tmp_path, stage_one, strict, caplog):
    """A host's checkpoint holds CLIP: nothing else is needed, and what was pretrained is not looked at."""
    cfg = maft_cfg("MaskFormerProposals")
    cfg.MODEL.OVSEG.CLIP.PRETRAINED = "no_such_tag"
    with caplog.at_level(logging.INFO):
        model = load(tmp_path, cfg, strict=strict, weights=stage_one.state_dict())
    assert_same(model, stage_one)
    assert_same(model, stage_one, "clip.visual.tower.", own_prefix="ip_clip.tower.")
    assert COPIED in caplog.text and "initial values kept" not in caplog.text


@pytest.mark.parametrize("strict", [True, False])
def test_stage_one_as_the_generator(tmp_path, stage_one, maft, strict, caplog):
    cfg = maft_cfg("MaskFormerProposals")
    files = {"proposals": stage_one.state_dict(), "clip": open_clip_names(maft.clip)}
    model = load(tmp_path, cfg, strict=strict, **files)
    assert_same(model, stage_one, "proposals.")
    assert_same(model, maft, "clip.")  # not that of the generator's file
    assert_same(model, maft, "clip.visual.tower.", own_prefix="ip_clip.tower.")
    # Over a whole MAFT, the masks alone become others.
    model = load(tmp_path, cfg, strict=strict, weights=maft.state_dict(), **files)
    assert_same(model, stage_one, "proposals.")
    assert_same(model, maft, "ip_clip.")
    assert "in no file" in caplog.text


def test_evaluation_without_ip_clip_is_that_of_the_untuned_one(tmp_path, stage_one, caplog):
    """The pretrained CLIP with mask tokens, as the training-free model has it."""
    cfg = maft_cfg()
    cfg.MODEL.OVSEG.CLIP.INPUT_SIZE = 64  # the table of positions is not resized: that is where the two differ
    free = maft_cfg()
    free.MODEL.META_ARCHITECTURE = "TrainingFree"
    free.MODEL.OVSEG.CLIP.INPUT_SIZE, free.MODEL.OVSEG.CLIP.TRAINABLE = 64, "frozen"
    free.MODEL.OVSEG.TRAINING_FREE.START_LAYER = cfg.MODEL.OVSEG.MAFT.START_LAYER
    weights = part(stage_one, "clip.")
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path, cfg, weights=weights)
    assert caplog.text.count(COPIED) == 1
    other = random_host(cfg, seed=9)
    other.load_state_dict(weights, strict=False)
    batch = host_inputs((48, 64))
    found = sem_seg(model, batch)[0]
    expected = sem_seg(load(tmp_path, free, weights=weights), batch)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert float((found - sem_seg(other, batch)[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("policy", ["attention_qv", "full"])
def test_copies_for_other_policies(tmp_path, stage_one, policy):
    cfg = maft_cfg()
    cfg.MODEL.OVSEG.CLIP.TRAINABLE = policy
    model = load(tmp_path, cfg, clip=open_clip_names(stage_one.clip))
    first = model.ip_clip.tower.transformer.resblocks[0].attn
    packed = stage_one.clip.visual.tower.transformer.resblocks[0].attn.in_proj_weight
    split = [first.q_proj_weight, first.k_proj_weight, first.v_proj_weight] if policy == "attention_qv" else None
    assert torch.equal(torch.cat(split) if split else first.in_proj_weight, packed)
    assert_same(load(tmp_path, cfg, weights=model.state_dict()), model)


def test_a_part_of_ip_clip_is_not_filled_up(tmp_path, maft):
    """Half a tuned CLIP with half an untuned one is neither."""
    weights = {name: value for name, value in maft.state_dict().items() if name != "ip_clip.tower.proj"}
    with pytest.raises(ValueError, match="1 missing, expected for example ip_clip.tower.proj") as error:
        load(tmp_path, maft_cfg("MaskFormerProposals"), weights=weights)
    assert "\n" not in str(error.value)


def test_neither_clip_nor_generator_are_random(tmp_path, stage_one, maft):
    with pytest.raises(ValueError, match="CLIP.PRETRAINED is empty and MODEL.WEIGHTS does not hold CLIP"):
        load(tmp_path, maft_cfg(), weights=part(maft, "ip_clip."), strict=False)
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty, expected a checkpoint: .*proposals.backbone"):
        load(tmp_path, maft_cfg("MaskFormerProposals"), clip=open_clip_names(stage_one.clip))


# ---- a generator on a CLIP of its own


@pytest.fixture(scope="module")
def own_tower():
    return random_host(host_cfg("FCCLIPProposals"), seed=3)


@pytest.mark.parametrize("strict", [True, False])
def test_two_pretrained_clips(tmp_path, own_tower, strict):
    proposals = part(own_tower, "proposals.pixel_decoder.", "proposals.mask_decoder.")
    files = {"clip": open_clip_names(own_tower.clip), "own_clip": open_clip_names(own_tower.proposals.clip)}
    model = load(tmp_path, host_cfg("FCCLIPProposals"), strict=strict, proposals=proposals, **files)
    assert_same(model, own_tower)


def test_a_file_of_the_generator_holds_its_clip(tmp_path, own_tower):
    cfg = host_cfg("FCCLIPProposals")
    cfg.MODEL.OVSEG.PROPOSALS.CLIP_PRETRAINED = "no_such_tag"
    files = {"proposals": part(own_tower, "proposals."), "clip": open_clip_names(own_tower.clip)}
    assert_same(load(tmp_path, cfg, **files), own_tower)
    cfg = maft_cfg("FCCLIPProposals")
    cfg.MODEL.OVSEG.PROPOSALS.CLIP_PRETRAINED = "no_such_tag"
    assert_same(load(tmp_path, cfg, weights=own_tower.state_dict()), own_tower)


def test_the_generators_clip_is_never_random(tmp_path, own_tower):
    files = {"proposals": part(own_tower, "proposals.mask_decoder.", "proposals.pixel_decoder.")}
    files["clip"] = open_clip_names(own_tower.clip)
    with pytest.raises(ValueError, match="PROPOSALS.CLIP_PRETRAINED is empty.*proposals.clip") as error:
        load(tmp_path, host_cfg("FCCLIPProposals"), strict=False, **files)
    assert "\n" not in str(error.value)


def test_a_class_head_can_be_learned_for_given_masks(tmp_path, own_tower):
    """Masks from a file without a classifier, or with that of another kind; evaluation wants one."""
    head = "proposals.mask_decoder.class_embed."
    masks = {name: value for name, value in part(own_tower, "proposals.").items() if not name.startswith(head)}
    files = {"proposals": masks, "clip": open_clip_names(own_tower.clip)}
    cfg = host_cfg("FCCLIPProposals")
    cfg.MODEL.OVSEG.PROPOSALS.TRAINABLE = "class_head"
    model = load(tmp_path, cfg, strict=False, **files)
    for name, value in masks.items():
        assert torch.equal(model.state_dict()[name], value)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(head) for name in trained)
    with pytest.raises(ValueError, match=r"MODEL.WEIGHTS is empty, expected a checkpoint: .* \(class_embed"):
        load(tmp_path, cfg, strict=True, **files)


def test_every_tensor_of_a_trained_maft_is_in_its_checkpoint(tmp_path, maft):
    """What a run saves is what an evaluation loads, without any other file."""
    model = build_model(maft_cfg("MaskFormerProposals"))
    assert set(model.state_dict()) == set(maft.state_dict())
    loaded = load(tmp_path, maft_cfg("MaskFormerProposals"), weights=maft.state_dict())
    batch = host_inputs((48, 64))
    torch.testing.assert_close(sem_seg(loaded, batch)[0], sem_seg(maft, batch)[0])
