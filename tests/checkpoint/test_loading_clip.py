"""Weights of models with a CLIP: the pretrained one, public FC-CLIP files, files of parts."""

import logging
from pathlib import Path

import open_clip
import pytest
import torch
from detectron2.modeling import build_model

from ovseg_d2.checkpoint.convert import convert_state_dict
from ovseg_d2.checkpoint.io import save_atomic
from ovseg_d2.engine import load_parts
from ovseg_d2.engine.load_config import load_config
from tests.modeling.tiny_fcclip import fcclip_cfg, inputs, random_fcclip

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PUBLIC_LIST = Path(__file__).parent / "state_dicts" / "fcclip_convnext_large.txt"
VOID = "proposals.mask_decoder.class_embed.void_embedding.weight"


@pytest.fixture(scope="module")
def source():
    return random_fcclip(seed=1)


def open_clip_names(model):
    """CLIP's weights as open_clip writes them."""
    return {
        name.removeprefix("text.").replace("visual.tower.", "visual."): value
        for name, value in model.clip.state_dict().items()
    }


def public_names(model):
    """The public FC-CLIP's names, written down independently of the conversion."""
    renamed = {"criterion.empty_weight": torch.ones(134)}
    renamed |= {f"backbone.clip_model.{name}": value for name, value in open_clip_names(model).items()}
    for name, value in model.proposals.pixel_decoder.state_dict().items():
        name = "transformer.level_embed" if name == "level_embed" else name
        name = name.replace("encoder.", "transformer.encoder.layers.", 1)
        name = name.replace("lateral.0", "adapter_1").replace("output.0", "layer_1")
        renamed[f"sem_seg_head.pixel_decoder.{name}"] = value
    heads = {"pool_norm": "_mask_pooling_proj.0", "pool_proj": "_mask_pooling_proj.1", "mlp": "class_embed"}
    blocks = {
        "self_attn.attn": "transformer_self_attention_layers.{}.self_attn",
        "self_attn.norm": "transformer_self_attention_layers.{}.norm",
        "cross_attn.attn": "transformer_cross_attention_layers.{}.multihead_attn",
        "cross_attn.norm": "transformer_cross_attention_layers.{}.norm",
        "ffn.linear1": "transformer_ffn_layers.{}.linear1",
        "ffn.linear2": "transformer_ffn_layers.{}.linear2",
        "ffn.norm": "transformer_ffn_layers.{}.norm",
    }
    for name, value in model.proposals.mask_decoder.state_dict().items():
        first, _, rest = name.partition(".")
        if name == "class_embed.void_embedding.weight":
            renamed["void_embedding.weight"] = value
            continue
        if first == "class_embed":
            head, _, inner = rest.partition(".")
            name = f"{heads[head]}.{inner}" if head in heads else head
        elif first == "layers":
            number, *block, inner = rest.split(".", 3)
            name = f"{blocks['.'.join(block)].format(number)}.{inner}"
        renamed[f"sem_seg_head.predictor.{name}"] = value
    return renamed


def load(tmp_path, *, weights=None, clip=None, proposals=None, strict=True):
    """A model of other random weights, with those of the given dicts loaded."""
    cfg = fcclip_cfg()
    ovseg = cfg.MODEL.OVSEG
    for node, key, state_dict in (
        (cfg.MODEL, "WEIGHTS", weights),
        (ovseg.CLIP, "PRETRAINED", clip),
        (ovseg.PROPOSALS, "WEIGHTS", proposals),
    ):
        if state_dict is not None:
            node[key] = str(tmp_path / f"{key}.pth")
            save_atomic(state_dict, node[key])
    model = random_fcclip(cfg, seed=2)
    load_parts(model, cfg, strict=strict)
    return model


def assert_same(model, source, prefix=""):
    expected = source.state_dict()
    names = [name for name in expected if name.startswith(prefix)]
    assert names
    for name in names:
        torch.testing.assert_close(model.state_dict()[name], expected[name])


def part(model, prefix):
    return {name: value for name, value in model.state_dict().items() if name.startswith(prefix)}


@pytest.mark.parametrize("strict", [True, False])
def test_own_checkpoints_hold_clip(tmp_path, source, strict):
    # Another pretrained CLIP is not even looked at.
    cfg = fcclip_cfg()
    cfg.MODEL.WEIGHTS = str(tmp_path / "own.safetensors")
    cfg.MODEL.OVSEG.CLIP.PRETRAINED = "no_such_tag"
    save_atomic(source.state_dict(), cfg.MODEL.WEIGHTS)
    model = build_model(cfg)
    load_parts(model, cfg, strict=strict)
    assert_same(model, source)


@pytest.mark.parametrize("whole", [True, False], ids=["with CLIP", "heads and void alone"])
def test_public_files(tmp_path, source, whole):
    public = public_names(source)
    assert not any("proposals" in name or "tower" in name for name in public)
    if not whole:
        public = {name: value for name, value in public.items() if "clip_model" not in name}
    converted, message = convert_state_dict(public)
    assert "public FC-CLIP" in message and "1 without counterpart dropped" in message
    model = load(tmp_path, weights=public, clip=None if whole else open_clip_names(source))
    assert_same(model, source)
    with torch.no_grad():
        batch = inputs((40, 56))
        results = [m.eval()(batch)[0]["sem_seg"] for m in (model, source)]
    torch.testing.assert_close(*results)


def test_clip_and_generator_from_a_file_each(tmp_path, source):
    generator = {name: value for name, value in source.state_dict().items() if name.startswith("proposals.")}
    assert VOID in generator
    assert_same(load(tmp_path, clip=open_clip_names(source), proposals=generator), source)


def test_weights_lie_over_the_pretrained_clip(tmp_path, source):
    """A checkpoint with a part of CLIP (tuned, say) gets the rest from the pretrained one."""
    other = random_fcclip(seed=3)
    weights = part(other, "proposals.") | part(other, "clip.visual.")
    model = load(tmp_path, weights=weights, clip=open_clip_names(source))
    assert_same(model, other, "clip.visual.")
    assert_same(model, other, "proposals.")
    assert_same(model, source, "clip.text.")


def test_a_training_starts_from_the_pretrained_clip(tmp_path, source, caplog):
    with caplog.at_level(logging.INFO):
        model = load(tmp_path, clip=open_clip_names(source), strict=False)
    assert_same(model, source, "clip.")
    assert "CLIP OVShapes-RN: " in caplog.text
    torch.testing.assert_close(model.state_dict()[VOID], random_fcclip(seed=2).state_dict()[VOID])


def test_what_is_in_one_file_is_not_missing_in_the_other(tmp_path, source, caplog):
    with caplog.at_level(logging.INFO):
        load(tmp_path, weights=part(source, "proposals."), clip=open_clip_names(source))
    assert "initial values kept" not in caplog.text


@pytest.mark.parametrize("strict", [True, False])
def test_clip_is_never_random(tmp_path, source, strict):
    with pytest.raises(ValueError, match="CLIP.PRETRAINED is empty.*clip.text") as error:
        load(tmp_path, weights=part(source, "proposals."), strict=strict)
    assert "\n" not in str(error.value)
    incomplete = {name: v for name, v in open_clip_names(source).items() if name != "visual.conv1.weight"}
    with pytest.raises(ValueError, match="1 missing, first visual.conv1.weight"):
        load(tmp_path, weights=part(source, "proposals."), clip=incomplete, strict=strict)


def test_strict_wants_every_tensor_from_somewhere(tmp_path, source):
    clip = open_clip_names(source)
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty, expected a checkpoint.*proposals.pixel_decoder"):
        load(tmp_path, clip=clip)
    without_void = {name: v for name, v in part(source, "proposals.").items() if name != VOID}
    with pytest.raises(ValueError, match="1 missing, expected for example .*void_embedding"):
        load(tmp_path, weights=without_void, clip=clip)
    # All of the generator's own file but that is there: a checkpoint of the whole model is what is missing.
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty, expected a checkpoint.*void_embedding"):
        load(tmp_path, proposals=without_void, clip=clip)


@pytest.mark.parametrize("path", sorted((CONFIGS / "fcclip").glob("coco_*.yaml")), ids=lambda path: path.stem)
def test_public_configurations_name_weights_that_exist(path):
    cfg = load_config(path)
    options, ensemble = cfg.MODEL.OVSEG.CLIP, cfg.MODEL.OVSEG.ENSEMBLE
    assert options.PRETRAINED in open_clip.list_pretrained_tags_by_model(options.NAME)
    # Weights that were trained with another activation load without a word.
    trained_with = open_clip.get_pretrained_cfg(options.NAME, options.PRETRAINED).get("quick_gelu", False)
    assert trained_with == open_clip.get_model_config(options.NAME).get("quick_gelu", False)
    assert cfg.MODEL.OVSEG.PROPOSALS.NUM_QUERIES == 250 and cfg.MODEL.OVSEG.TEST.OBJECT_MASK_THRESHOLD == 0.0
    assert (ensemble.ALPHA, ensemble.BETA) == (0.4, 0.8)
    assert ensemble.VALID_MASKS_ONLY == options.NAME.startswith("RN")
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (368750, 1e-4)


def test_every_public_name_has_its_place():
    """All tensors of the public ConvNeXt-L model: names and shapes."""
    public = {}
    for line in PUBLIC_LIST.read_text().splitlines():
        name, _, shape = line.partition(" ")
        public[name] = torch.empty([int(n) for n in shape.strip("()").split(",") if n.strip()], device="meta")
    assert len(public) == 846
    converted, message = convert_state_dict(public)
    assert "845 keys renamed, 1 without counterpart dropped (criterion.empty_weight" in message
    with torch.device("meta"):
        model = build_model(load_config(CONFIGS / "fcclip" / "coco_panoptic_ConvNeXtL.yaml", ["MODEL.DEVICE", "meta"]))
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == own
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 20_721_601
