"""Files of mask generators for MaskCLIP++: with the CLIP that they bring or without, and files in the wrong place."""

import pytest
import torch
from detectron2.data import MetadataCatalog

from ovseg_d2.checkpoint.io import save_atomic
from ovseg_d2.engine import load_parts
from tests.modeling.tiny_fcclip import fcclip_cfg, random_fcclip
from tests.modeling.tiny_hosts import host_inputs, sem_seg
from tests.modeling.tiny_maskclippp import maskclippp_cfg, random_maskclippp

HEAD = "proposals.mask_decoder.class_embed."


def generator_cfg(kind="FCCLIPProposals", *, clip="OVShapes-ViT"):
    cfg = maskclippp_cfg(clip)
    prop = cfg.MODEL.OVSEG.PROPOSALS
    prop.NAME, prop.CLASS_HEAD = kind, {"FCCLIPProposals": "text", "Mask2FormerProposals": "linear"}.get(kind, "none")
    if kind == "FCCLIPProposals":
        prop.CLIP_NAME = "OVShapes-RN"
    return cfg


@pytest.fixture(scope="module")
def fcclip():
    """The generator's own training: its CLIP is the model's there. As MAFT+, it has tuned it."""
    return random_fcclip(fcclip_cfg(), seed=5)


@pytest.fixture(scope="module")
def tuned():
    return random_maskclippp(generator_cfg("PrecomputedProposals"), seed=6)


def open_clip_names(clip):
    return {
        name.removeprefix("text.").replace("visual.tower.", "visual."): value
        for name, value in clip.state_dict().items()
        if not name.endswith("mask_logit_scale")
    }


def public_names(model, *, clip=True, layout="fcclip"):
    """As public FC-CLIP and MAFT+ files are, written down independently of the conversion."""
    renamed = {}
    for name, value in model.state_dict().items():
        if name.startswith("clip."):
            continue
        for ours, theirs in (
            (f"{HEAD}void_embedding.", "void_embedding."),
            (f"{HEAD}mlp.layers.", "sem_seg_head.predictor.class_embed.layers."),
            (f"{HEAD}pool_norm.", "sem_seg_head.predictor._mask_pooling_proj.0."),
            (f"{HEAD}pool_proj.", "sem_seg_head.predictor._mask_pooling_proj.1."),
            (f"{HEAD}logit_scale", "sem_seg_head.predictor.logit_scale"),
            ("proposals.pixel_decoder.", "sem_seg_head.pixel_decoder."),
            ("proposals.mask_decoder.", "sem_seg_head.predictor."),
        ):
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
        renamed[name] = value
    if clip:
        renamed |= {f"backbone.clip_model.{name}": value for name, value in open_clip_names(model.clip).items()}
    if layout == "maft_plus":
        renamed["cdt.cross_atten.norm.weight"] = torch.zeros(3)
    return renamed


def part(model, *prefixes):
    return {name: value for name, value in model.state_dict().items() if name.startswith(prefixes)}


def load(tmp_path, cfg, **files):
    """A model of other random weights, with those of the given dicts loaded."""
    ovseg = cfg.MODEL.OVSEG
    places = {
        "weights": (cfg.MODEL, "WEIGHTS"),
        "clip": (ovseg.CLIP, "PRETRAINED"),
        "proposals": (ovseg.PROPOSALS, "WEIGHTS"),
        "own_clip": (ovseg.PROPOSALS, "CLIP_PRETRAINED"),
    }
    for name, content in files.items():
        node, key = places[name]
        node[key] = str(tmp_path / f"{name}.pth")
        save_atomic(content, node[key])
    model = random_maskclippp(cfg, seed=9)
    load_parts(model, cfg, strict=True)
    return model


def assert_holds(model, source, prefix="", *, at=""):
    own, expected = model.state_dict(), part(source, prefix)
    assert expected
    for name, value in expected.items():
        assert torch.equal(own[at + name], value), name


@pytest.mark.parametrize("layout", ["fcclip", "maft_plus", "ours"])
def test_a_generators_file_fills_its_own_clip(tmp_path, fcclip, tuned, layout):
    """Both towers; the model's CLIP is that of the tuned checkpoint."""
    proposals = fcclip.state_dict() if layout == "ours" else public_names(fcclip, layout=layout)
    cfg = generator_cfg()
    cfg.MODEL.OVSEG.PROPOSALS.CLIP_PRETRAINED = "no_such_tag"
    model = load(tmp_path, cfg, weights=tuned.state_dict(), proposals=proposals)
    assert_holds(model, tuned)
    assert_holds(model, fcclip, "proposals.")
    assert_holds(model, fcclip, "clip.", at="proposals.")
    assert sem_seg(model, host_inputs((48, 64)))[0].std() > 0


@pytest.mark.parametrize("held", ["nothing", "image tower"])
def test_what_the_file_lacks_is_the_pretrained(tmp_path, fcclip, tuned, held):
    """FC-CLIP's file without its frozen CLIP, or one that has tuned the image tower alone."""
    proposals = public_names(fcclip, clip=False)
    if held == "image tower":
        visual = {n: t for n, t in open_clip_names(fcclip.clip).items() if n.startswith("visual.")}
        proposals |= {f"backbone.clip_model.{name}": value for name, value in visual.items()}
    other = random_fcclip(fcclip_cfg(), seed=7)
    files = {"weights": tuned.state_dict(), "proposals": proposals}
    with pytest.raises(ValueError, match="PROPOSALS.CLIP_PRETRAINED is empty.*proposals.clip"):
        load(tmp_path, generator_cfg(), **files)
    model = load(tmp_path, generator_cfg(), **files, own_clip=open_clip_names(other.clip))
    assert_holds(model, fcclip, "proposals.")
    assert_holds(model, other, "clip.text.", at="proposals.")
    assert_holds(model, other if held == "nothing" else fcclip, "clip.visual.", at="proposals.")
    assert_holds(model, tuned)


def test_the_whole_model_as_the_generators_file(tmp_path, tuned):
    """Where the generator has its CLIP beside the model's, that one is taken."""
    whole = random_maskclippp(generator_cfg(), seed=8)
    model = load(tmp_path, generator_cfg(), weights=tuned.state_dict(), proposals=whole.state_dict())
    assert_holds(model, whole, "proposals.")
    assert_holds(model, tuned)


def test_a_generator_of_another_clip(tmp_path, fcclip, tuned):
    cfg = generator_cfg()
    proposals = public_names(fcclip) | {"backbone.clip_model.visual.layer4.7.conv1.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match="does not fit the model.*proposals.clip.visual.tower.layer4.7"):
        load(tmp_path, cfg, weights=tuned.state_dict(), proposals=proposals)


def test_a_closed_generator(tmp_path, tuned, dataset):
    cfg = generator_cfg("Mask2FormerProposals")
    cfg.MODEL.OVSEG.PROPOSALS.DATASET = dataset
    whole = random_maskclippp(cfg.clone(), seed=8)
    proposals = part(whole, "proposals.")
    model = load(tmp_path, cfg.clone(), weights=tuned.state_dict(), proposals=proposals)
    assert_holds(model, whole, "proposals.")
    proposals[f"{HEAD}weight"] = torch.zeros(8, 32)
    with pytest.raises(ValueError, match=r"class_embed.weight is \(8, 32\) in the file, \(6, 32\) in the model"):
        load(tmp_path, cfg, weights=tuned.state_dict(), proposals=proposals)


@pytest.fixture
def dataset():
    MetadataCatalog.get("tiny_generator").set(thing_classes=["a", "b", "c", "d", "e"])
    yield "tiny_generator"
    MetadataCatalog.remove("tiny_generator")


# ---- files in the wrong place


@pytest.mark.parametrize(
    ("place", "what", "message"),
    [
        ("clip", "generator", "CLIP.PRETRAINED: .* mask generator .public FC-CLIP. and no CLIP; .*PROPOSALS.WEIGHTS"),
        ("own_clip", "generator", "PROPOSALS.CLIP_PRETRAINED: .* a mask generator .* belongs in .*PROPOSALS.WEIGHTS"),
        ("weights", "generator", "MODEL.WEIGHTS: .*public FC-CLIP. and lacks CLIP, .* belongs in .*PROPOSALS.WEIGHTS"),
        ("weights", "fcclip", "MODEL.WEIGHTS: .* lacks the similarity of masks .* belongs in .*PROPOSALS.WEIGHTS"),
        (
            "proposals",
            "clip",
            "PROPOSALS.WEIGHTS: .* holds a CLIP and no .*CLIP.PRETRAINED, or, .*CLIP_PRETRAINED",
        ),
        ("proposals", "tuned", "PROPOSALS.WEIGHTS: .* holds a CLIP and no mask generator; it belongs in MODEL.WEIGHTS"),
        ("proposals", "maskclippp", "PROPOSALS.WEIGHTS: .* CLIP .public MaskCLIP... .* it belongs in MODEL.WEIGHTS"),
    ],
)
def test_a_file_in_the_wrong_place(tmp_path, fcclip, tuned, place, what, message):
    content = {
        "generator": lambda: public_names(fcclip, clip=False),
        "fcclip": lambda: public_names(fcclip),
        "clip": lambda: open_clip_names(tuned.clip),
        "tuned": tuned.state_dict,
        "maskclippp": lambda: {
            f"visual_encoder.proxy.{name.removeprefix('visual.')}": value
            for name, value in open_clip_names(tuned.clip).items()
            if name.startswith("visual.")
        },
    }[what]()
    files = {
        "clip": open_clip_names(tuned.clip),
        "own_clip": open_clip_names(fcclip.clip),
        "proposals": public_names(fcclip, clip=False),
        place: content,
    }
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, generator_cfg(), **files)
    assert "\n" not in str(error.value)


def test_openais_archive_as_a_generator(tmp_path, tuned):
    class Nothing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    cfg = generator_cfg()
    cfg.MODEL.OVSEG.PROPOSALS.WEIGHTS = str(tmp_path / "ViT.pt")
    torch.jit.save(torch.jit.trace(Nothing(), torch.zeros(1)), cfg.MODEL.OVSEG.PROPOSALS.WEIGHTS)
    with pytest.raises(ValueError, match="PROPOSALS.WEIGHTS: .*ViT.pt is a TorchScript archive.*CLIP.PRETRAINED"):
        load(tmp_path, cfg, weights=tuned.state_dict())
