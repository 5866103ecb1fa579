"""Public checkpoints of ZegFormer, ZSSeg, OVSeg, FreeSeg and MAFT: names and shapes of all their tensors."""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

import ovseg_d2.modeling  # noqa: F401  (registers the models)
from ovseg_d2.checkpoint.convert import convert_state_dict
from ovseg_d2.config import add_ovseg_config
from ovseg_d2.modeling.clip.build import build_clip
from ovseg_d2.modeling.proposals import build_mask_proposals

LISTS = Path(__file__).parent / "state_dicts"
VOID = "proposals.mask_decoder.class_embed.void_embedding.weight"
PROMPTS = {"prompts.prefix_prompt": (16, 512)}
SIGNALS = {f"clip_adapter.prompt_learner.{name}_signal" for name in ("start", "dot", "end", "pad")}
ADAPTER = {"criterion.empty_weight", "clip_adapter.pixel_mean", "clip_adapter.pixel_std"}

# Layout, number of tensors, generator, meta-architecture, what is dropped, what is beside generator and CLIP.
HOSTS = {
    "zegformer": ("ZegFormer", 969, "MaskFormerProposals", "FrozenCLIP", {"criterion.empty_weight"}, {}),
    "zsseg": ("ZSSeg", 987, "MaskFormerProposals", "FrozenCLIP", ADAPTER | SIGNALS, PROMPTS),
    "ovseg": ("OVSeg", 983, "MaskFormerProposals", "FrozenCLIP", ADAPTER, {"mask_prompts.embeddings": (3, 196, 768)}),
    "freeseg": (
        "FreeSeg",
        1167,
        "FreeSegProposals",
        "FrozenCLIP",
        ADAPTER | SIGNALS,
        PROMPTS | {"prompts.task_prompt": (8, 512)},
    ),
    "maft": ("MAFT", 1465, "FreeSegProposals", "MAFT", ADAPTER, {}),
}


def public_names(host):
    """Every tensor of a list, on the meta device."""
    tensors = {}
    for line in (LISTS / f"{host}.txt").read_text().splitlines():
        name, _, shape = line.partition(" ")
        tensors[name] = torch.empty([int(n) for n in shape.strip("()").split(",") if n.strip()], device="meta")
    assert len(tensors) == HOSTS[host][1]
    return tensors


def host_cfg(host):
    """The architecture of the public configuration."""
    _, _, generator, architecture, _, _ = HOSTS[host]
    cfg = get_cfg()
    add_ovseg_config(cfg)
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.INPUT.FORMAT = "RGB"
    cfg.DATASETS.TRAIN = ()
    cfg.MODEL.RESNETS.DEPTH = 101
    if host != "zegformer":
        cfg.MODEL.BACKBONE.NAME = "build_resnet_deep_stem_backbone"
        cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 128
    ovseg = cfg.MODEL.OVSEG
    ovseg.CLIP.NAME = "ViT-B-16-quickgelu"
    prop = ovseg.PROPOSALS
    prop.NAME, prop.CLASS_HEAD = generator, "embed"
    prop.DEC_LAYERS = 10 if generator == "FreeSegProposals" else 6
    if host == "zegformer":
        prop.EMBED_LAYERS, prop.LEARN_TEMPERATURE, prop.VOID_NORMALISED = 1, True, False
    return cfg


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("host", HOSTS)
def test_every_public_name_has_its_place(host):
    layout, _, _, _, dropped, beside = HOSTS[host]
    public = public_names(host)
    converted, message = convert_state_dict(public)
    dropped = {name for name in public if name in dropped or name.startswith("T.")}
    assert f"public {layout}: {len(public) - len(dropped)} keys renamed, {len(dropped)} without" in message
    assert len(converted) == len(public) - len(dropped)

    cfg = host_cfg(host)
    with torch.device("meta"):
        clip = build_clip(cfg.MODEL.OVSEG.CLIP.NAME)
        generator = build_mask_proposals(cfg, clip)
    expected = beside | {f"clip.{name}": shape for name, shape in shapes(clip.state_dict()).items()}
    expected |= {f"proposals.{name}": shape for name, shape in shapes(generator.state_dict()).items()}
    if host == "maft":
        tower = shapes(clip.visual.tower.state_dict())
        expected |= {f"ip_clip.tower.{name}": shape for name, shape in tower.items()}
    assert shapes(converted) == expected


@pytest.mark.parametrize("host", HOSTS)
def test_the_models_have_these_tensors(host):
    cfg = host_cfg(host)
    with torch.device("meta"):
        model = build_model(cfg)
    converted, _ = convert_state_dict(public_names(host))
    own = shapes(model.state_dict())
    beside = {name for name in converted if name.split(".")[0] not in ("proposals", "clip", "ip_clip")}
    assert own == {name: shape for name, shape in shapes(converted).items() if name not in beside}


def test_training_files_of_zegformer_lack_clip():
    public = {name: t for name, t in public_names("zegformer").items() if ".clip_model." not in name}
    converted, message = convert_state_dict(public)
    assert "public ZegFormer" in message and {name.split(".")[0] for name in converted} == {"proposals"}


@pytest.mark.parametrize(("host", "layout"), [("maft", "public FreeSeg"), ("ovseg", "public ZSSeg")])
def test_files_before_the_last_stage(host, layout):
    """MAFT's first stage has no tuned copy of CLIP yet; OVSeg before its mask prompts is a ZSSeg."""
    later = ("IPCLIP.", "T.", "clip_adapter.clip_model.visual.mask_embedding")
    public = {name: t for name, t in public_names(host).items() if not name.startswith(later)}
    converted, message = convert_state_dict(public)
    whole, _ = convert_state_dict(public_names(host))
    assert layout in message
    assert shapes(converted).items() <= shapes(whole).items() and VOID in converted


@pytest.mark.parametrize("host", ["zsseg", "freeseg"])
@pytest.mark.parametrize("alone", [True, False], ids=["prompts", "with CLIP"])
def test_files_of_prompts(host, alone):
    prefix = "clip_adapter.prompt_learner." if alone else "clip_adapter."
    public = {name: t for name, t in public_names(host).items() if name.startswith(prefix)}
    converted, message = convert_state_dict(public)
    assert "public prompts" in message
    assert {name for name in converted if name.startswith("prompts.")} == set(HOSTS[host][5])
    assert all(name.startswith(("prompts.", "clip.", VOID)) for name in converted)
    assert {name: shapes(converted)[name] for name in HOSTS[host][5]} == HOSTS[host][5]


def test_region_adapter_of_zsseg():
    """Its VOC models classify regions by learned prompts, queries by a template: two adapters in one file."""
    public = {name: t for name, t in public_names("zsseg").items() if ".prompt_learner." not in name}
    region = {f"_region_{name}": t for name, t in public_names("zsseg").items() if name.startswith("clip_adapter.")}
    converted, message = convert_state_dict(public | region)
    expected, _ = convert_state_dict(public_names("zsseg"))
    assert "public ZSSeg" in message and shapes(converted) == shapes(expected)
    own = public["clip_adapter.non_object_embedding"]
    assert converted[VOID] is own


@pytest.mark.parametrize(
    ("host", "official", "ours"),
    [
        # Tensors of equal shapes, which the lists alone do not tell apart.
        ("zsseg", "transformer.decoder.layers.4.norm1.bias", "layers.4.self_attn.norm.bias"),
        ("zsseg", "transformer.decoder.layers.4.norm2.bias", "layers.4.cross_attn.norm.bias"),
        ("zsseg", "transformer.decoder.layers.4.norm3.bias", "layers.4.ffn.norm.bias"),
        ("zsseg", "transformer.decoder.layers.0.self_attn.in_proj_bias", "layers.0.self_attn.attn.in_proj_bias"),
        ("zsseg", "transformer.decoder.layers.0.multihead_attn.in_proj_bias", "layers.0.cross_attn.attn.in_proj_bias"),
        ("zsseg", "transformer.decoder.norm.weight", "decoder_norm.weight"),
        ("freeseg", "transformer_self_attention_layers.9.norm.bias", "layers.9.self_attn.norm.bias"),
        ("freeseg", "transformer_cross_attention_layers.9.norm.bias", "layers.9.cross_attn.norm.bias"),
    ],
)
def test_tensors_of_equal_shapes(host, official, ours):
    public = public_names(host)
    converted, _ = convert_state_dict(public)
    assert converted[f"proposals.mask_decoder.{ours}"] is public[f"sem_seg_head.predictor.{official}"]


def test_pyramid_levels():
    public = public_names("ovseg")
    converted, _ = convert_state_dict(public)
    for level in range(4):
        official = public[f"sem_seg_head.pixel_decoder.layer_{level + 1}.norm.bias"]
        assert converted[f"proposals.pixel_decoder.output.{level}.norm.bias"] is official
