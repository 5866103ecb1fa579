"""Every public format to our names and back: nothing missing, nothing dropped but what has no counterpart."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ovseg_d2.checkpoint.convert import convert_checkpoint
from ovseg_d2.checkpoint.invert import invert_state_dict
from ovseg_d2.checkpoint.io import read_state_dict, save_atomic
from ovseg_d2.checkpoint.key_maps import KEY_MAPS
from tests.checkpoint.public_names import PUBLIC, Shapes
from tools import convert_checkpoint as tool

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def random_weights(shapes: Shapes, *, seed: int) -> dict[str, Tensor]:
    """Of these names and shapes; the last dimension is random, the others repeat it without taking memory."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape[-1:], generator=generator).expand(shape) for name, shape in shapes.items()}


def shrunk(shapes: Shapes) -> Shapes:
    return {name: tuple(min(n, 3) for n in shape) for name, shape in shapes.items()}


def same(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)


def test_every_layout_has_a_round_trip():
    assert {public.layout for public in PUBLIC.values()} == {key_map.name for key_map in KEY_MAPS}


@pytest.mark.parametrize("name", PUBLIC)
def test_there_and_back(name):
    public = PUBLIC[name]
    weights, other = (random_weights(public.shapes(), seed=seed) for seed in (1, 2))
    conversion = convert_checkpoint(weights)
    assert conversion.key_map is not None and conversion.key_map.name == public.layout
    dropped = {key for key in weights if re.fullmatch(public.dropped, key)}
    assert set(conversion.dropped) == dropped and not conversion.untouched
    joined = [key for keys in conversion.key_map.joined.values() for key in keys if key in weights]
    count = len(weights) - len(dropped) - len(joined) + len(conversion.key_map.joined)
    assert len(conversion.weights) == count and all(not t.is_meta for t in conversion.weights.values())

    back = invert_state_dict(conversion.weights, other, source="like.pth")
    assert list(back.weights) == list(weights) and not back.unused and set(back.copied) == dropped
    for key, tensor in back.weights.items():
        assert same(tensor, (other if key in dropped else weights)[key]), key


@pytest.mark.parametrize(
    ("name", "config", "missing"),
    [
        ("mask2former", "mask2former/ade20k_semantic_R50.yaml", 0),
        # MAFT+'s teacher is the pretrained CLIP, which is filled in. MaskCLIP++'s text tower, too, unless it was tuned.
        ("maft_plus", "maft_plus/coco_171_ConvNeXtL.yaml", 345),
        ("maskclippp_eva01", "maskclippp/coco_panoptic_EVAg14.yaml", 294),
        ("maskclippp_eva02", "maskclippp/coco_stuff_EVAL14.yaml", 0),
    ],
)
def test_names_and_shapes_are_those_of_the_model(name, config, missing):
    weights = random_weights(PUBLIC[name].shapes(), seed=1)
    match = tool.match_config(convert_checkpoint(weights).weights, str(CONFIGS / config))
    assert not match.prefix and len(match.missing) == missing
    assert all(key.startswith(("teacher.", "clip.text.", "clip.logit_scale")) for key in match.missing)
    assert len(match.weights) + missing == match.total


def test_early_releases_have_the_same_tensors():
    releases = (random_weights(PUBLIC[name].shapes(), seed=1) for name in ("early_mask2former", "mask2former"))
    early, late = (convert_checkpoint(weights).weights.keys() for weights in releases)
    assert early == late


# ---- the command


@pytest.mark.parametrize(
    ("name", "suffix"), [("early_mask2former", ".pkl"), ("freeseg", ".safetensors"), ("zegclip", ".pth")]
)
def test_the_command(tmp_path, capsys, name, suffix):
    """Files whose names say nothing, or the wrong thing, of what is in them."""
    shapes = shrunk(PUBLIC[name].shapes())
    weights = {key: t.contiguous() for key, t in random_weights(shapes, seed=1).items()}
    source, target, back = tmp_path / "fcclip.ckpt", tmp_path / "ours.safetensors", tmp_path / "official.pth"
    if suffix == ".pkl":
        source.write_bytes(pickle.dumps({"model": {key: t.numpy() for key, t in weights.items()}}))
        assert tool.main([str(source), str(target)]) == 2
        assert "refused: it is a Python pickle" in capsys.readouterr().err and not target.exists()
    else:
        written = tmp_path / f"weights{suffix}"
        save_atomic({"model": weights, "iteration": 3}, written)
        written.rename(source)
    assert tool.main([str(source), str(target), "--allow-pickle"]) == 0
    report = capsys.readouterr().out
    conversion = convert_checkpoint(weights)
    assert f"{PUBLIC[name].layout}, {len(weights)} tensors, {len(conversion.weights)} converted" in report
    assert f"without counterpart, not used: {len(conversion.dropped)}\n" in report
    assert all(f"  {key} {tuple(weights[key].shape)}\n" in report for key in conversion.dropped)
    read = read_state_dict(target)
    assert read.keys() == conversion.weights.keys()
    assert all(torch.equal(tensor, conversion.weights[key]) for key, tensor in read.items())

    assert tool.main([str(target), str(back), "--inverse", "--like", str(source), "--allow-pickle"]) == 0
    assert f"-> {PUBLIC[name].layout}, {len(weights)} tensors" in capsys.readouterr().out
    read = read_state_dict(back)
    assert read.keys() == weights.keys() and all(torch.equal(read[key], weights[key]) for key in weights)


def converted(tmp_path: Path, capsys, weights: dict[str, Tensor], *options: str) -> tuple[int, str, str]:
    """Exit code, output and error of the command."""
    source = tmp_path / "weights.pth"
    save_atomic(weights, source)
    code = tool.main([str(source), str(tmp_path / "ours.safetensors"), *options])
    captured = capsys.readouterr()
    assert captured.err.count("\n") <= 1 and (code == 0) == (tmp_path / "ours.safetensors").is_file()
    return code, captured.out, captured.err


def test_no_known_format(tmp_path, capsys):
    code, _, error = converted(tmp_path, capsys, {f"net.{i}.weight": torch.ones(1) for i in range(12)})
    assert code == 2 and "weights.pth matches no known format; its first 10 keys: net.0.weight, net.1.weight" in error
    assert "net.9.weight; formats tried: this project's own, public MaskCLIP++" in error and "net.10" not in error
    assert all(key_map.name in error for key_map in KEY_MAPS)


def test_what_no_rule_knows_is_listed(tmp_path, capsys):
    weights = {"sem_seg_head.predictor.query_feat.weight": torch.ones(2, 3), "ema.decay": torch.ones(1)}
    code, report, _ = converted(tmp_path, capsys, weights)
    assert code == 0 and "not of this format, kept under their names: 1\n  ema.decay (1,)\n" in report


def test_two_keys_for_one_tensor(tmp_path, capsys):
    place = "sem_seg_head.predictor"
    weights = {f"{place}.query_feat.weight": torch.ones(1), f"{place}.static_query.weight": torch.zeros(1)}
    code, _, error = converted(tmp_path, capsys, weights)
    assert code == 2 and "query_feat.weight and sem_seg_head.predictor.static_query.weight are both for" in error


def test_own_names_and_a_config_that_they_do_not_fit(tmp_path, capsys):
    weights = {"proposals.mask_decoder.query_feat.weight": torch.ones(2, 3)}
    code, report, _ = converted(tmp_path, capsys, weights)
    assert code == 0 and "this project's own names, 1 tensors" in report
    (tmp_path / "ours.safetensors").unlink()
    config = str(CONFIGS / "mask2former" / "ade20k_semantic_R50.yaml")
    code, _, error = converted(tmp_path, capsys, weights, "--config-file", config)
    assert code == 2 and "query_feat.weight is (2, 3) in the file, (100, 256) in the model" in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.pop("proposals.mask_decoder.query_feat.weight"), "has .*query_feat.* the checkpoint lacks"),
        (lambda own: own.update({"proposals.mask_decoder.query_feat.weight": torch.ones(7, 3)}), r"\(3, 3\) there"),
    ],
)
def test_back_into_another_architecture(change, message):
    like = random_weights(shrunk(PUBLIC["mask2former"].shapes()), seed=1)
    own = convert_checkpoint(like).weights
    change(own)
    with pytest.raises(ValueError, match=f"like.pth .public Mask2Former. .*{message}"):
        invert_state_dict(own, like, source="like.pth")
    with pytest.raises(ValueError, match="like.pth matches no known format"):
        invert_state_dict(own, {"a": torch.ones(1)}, source="like.pth")


def test_what_the_public_layout_does_not_have_is_listed():
    like = random_weights(shrunk(PUBLIC["mask2former"].shapes()), seed=1)
    own = convert_checkpoint(like).weights | {"clip.logit_scale": torch.ones(())}
    assert invert_state_dict(own, like, source="like.pth").unused == ("clip.logit_scale",)
