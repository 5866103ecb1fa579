"""MaskCLIP++ with the masks of every kind of generator: texts and sizes of its own, the ensemble, files."""

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch.nn import functional as F

from ovseg_d2.data.templates import VILD
from ovseg_d2.modeling.proposals.generator_copy import GeneratorCopy
from ovseg_d2.modeling.text_classifier import averaged
from ovseg_d2.structures import ImageBatch
from tests.modeling.tiny_fcclip import COLOURS
from tests.modeling.tiny_hosts import OTHERS, host_cfg, host_inputs, random_host, sem_seg
from tests.modeling.tiny_maskclippp import convnext_json, maskclippp_cfg, random_maskclippp

KINDS = ["fcclip", "mask2former", "precomputed"]
SIZES = [(65, 102), (96, 71)]


@pytest.fixture(scope="module")
def dataset():
    """The classes of the closed generator's training."""
    MetadataCatalog.get("tiny_generator").set(thing_classes=["brick", "red", "moon"])
    yield "tiny_generator"
    MetadataCatalog.remove("tiny_generator")


@pytest.fixture(scope="module")
def own_clip(tmp_path_factory):
    """A ConvNeXt whose embeddings have a fourth of the dimensions that those of the model's CLIP have."""
    return convnext_json(tmp_path_factory.mktemp("clip"))


def generator_cfg(kind, dataset, own_clip, *, ensemble=True, resize=0):
    cfg = maskclippp_cfg()
    ovseg = cfg.MODEL.OVSEG
    prop = ovseg.PROPOSALS
    prop.DATASET, prop.TRAINABLE = dataset, "frozen"
    if kind == "fcclip":
        prop.NAME, prop.CLASS_HEAD, prop.CLIP_NAME = "FCCLIPProposals", "text", own_clip
    if kind == "mask2former":
        prop.NAME, prop.CLASS_HEAD = "Mask2FormerProposals", "linear"
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    if ensemble and kind != "precomputed":
        ovseg.ENSEMBLE.NAME, ovseg.ENSEMBLE.ALPHA, ovseg.ENSEMBLE.BETA = "maskclippp", 0.6, 1.0
    if resize:
        prop.RESIZE, prop.INPUT_SIZE = "short", resize
    return cfg


@pytest.fixture(scope="module", params=KINDS)
def model(request, dataset, own_clip):
    resize = 80 if request.param != "precomputed" else 0
    return random_maskclippp(generator_cfg(request.param, dataset, own_clip, resize=resize)).eval()


def test_two_vocabularies_and_batches_of_one(model):
    batch = host_inputs(*SIZES)
    batch[1]["vocabulary"] = OTHERS
    scores = sem_seg(model, batch)
    assert [s.shape for s in scores] == [(4, *SIZES[0]), (3, *SIZES[1])]
    assert all(s.isfinite().all() and s.std() > 0 for s in scores)
    for one, expected in zip(batch, scores, strict=True):
        torch.testing.assert_close(sem_seg(model, [one])[0], expected, rtol=1e-3, atol=1e-5)
    same = host_inputs(SIZES[0], SIZES[0])  # all networks see the padding
    for one, expected in zip(same, sem_seg(model, same), strict=True):
        torch.testing.assert_close(sem_seg(model, [one])[0], expected, rtol=1e-3, atol=1e-5)
    # Training in between changes nothing for the next vocabulary.
    model.train()(host_inputs(SIZES[0]))
    torch.testing.assert_close(sem_seg(model, batch)[1], scores[1])


@torch.no_grad()
def test_the_classes_of_an_fcclip_are_texts_of_its_own(dataset, own_clip):
    cfg = generator_cfg("fcclip", dataset, own_clip)
    model = random_maskclippp(cfg).eval()
    text = model.proposals.own_text(COLOURS)
    assert text.embeds.shape == (5, 1, 32) and model.text(COLOURS).embeds.shape == (5, 2, 128)
    tower, classifier = model.proposals.clip.text, model.proposals.text_classifier
    assert classifier.templates == VILD
    tokens = classifier.tokenizer([template.replace("{}", "blue ring") for template in VILD])
    expected = F.normalize(F.normalize(tower(tokens), dim=-1).mean(dim=0), dim=-1)
    torch.testing.assert_close(text.embeds[2, 0], expected)

    # They are what its head sees, and CLIP's templates are not.
    images = model.preprocess(host_inputs(SIZES[0]))
    proposals = model.propose(model.proposals, images, averaged(model.text(COLOURS)), COLOURS)
    torch.testing.assert_close(proposals.class_logits, model.proposals(images, text=text).class_logits)
    cfg.MODEL.OVSEG.PROPOSALS.TEMPLATES = ["a {}"]
    other = random_maskclippp(cfg).eval().proposals.own_text(COLOURS)
    assert not torch.allclose(other.embeds, text.embeds, atol=1e-3)
    assert not any(p.requires_grad for p in model.proposals.parameters())


@pytest.mark.parametrize("head", ["text", "embed"])
def test_hosts_on_a_clip_of_their_own(own_clip, head):
    """A head that compares with the texts of the host's CLIP brings no tower."""
    cfg = host_cfg("FCCLIPProposals")
    cfg.MODEL.OVSEG.PROPOSALS.CLASS_HEAD, cfg.MODEL.OVSEG.PROPOSALS.CLIP_NAME = head, own_clip
    model = random_host(cfg)
    assert (model.proposals.clip.text is not None) == model.proposals.has_own_text == (head == "text")
    losses = model.train()(host_inputs(*SIZES))
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert sem_seg(model, host_inputs(SIZES[0]))[0].std() > 0


@torch.no_grad()
def test_the_ensemble_asks_the_generator(dataset, own_clip):
    """Classes that the closed generator knows move, the ratio of the others stays as CLIP has it."""
    alone, both = (
        random_maskclippp(generator_cfg("mask2former", dataset, own_clip, ensemble=ensemble)).eval()
        for ensemble in (False, True)
    )
    images = alone.preprocess(host_inputs(SIZES[0]))
    by_clip, by_both = (model.predict(images, COLOURS).class_logits[0] for model in (alone, both))
    void = by_clip.softmax(-1)[:, -1]
    torch.testing.assert_close(by_both.softmax(-1)[:, -1], void, rtol=1e-4, atol=1e-6)
    assert 0.01 < float(void.mean()) < 0.99
    # "red star" by its synonym and "brick" are known; "blue ring" and "grass" are not.
    torch.testing.assert_close(by_both[:, 1] - by_both[:, 2], by_clip[:, 1] - by_clip[:, 2], rtol=1e-3, atol=1e-3)
    assert float((by_both[:, 0] - by_both[:, 1] - by_clip[:, 0] + by_clip[:, 1]).abs().max()) > 0.05


@torch.no_grad()
def test_the_generator_has_a_size_of_its_own(dataset, own_clip):
    """It gets what resizing its input would give; CLIP's input does not change."""
    cfg = generator_cfg("mask2former", dataset, own_clip, resize=128)
    cfg.MODEL.OVSEG.CLIP.RESIZE, cfg.MODEL.OVSEG.CLIP.INPUT_SIZE = "short", 64
    model = random_maskclippp(cfg).eval()
    images = model.preprocess(host_inputs((64, 96)))
    frame = model.generator_copy(images)
    assert frame.image_sizes == [(128, 192)] and frame.padded_size == (128, 192)
    expected = F.interpolate(images.tensor, size=(128, 192), mode="bilinear", align_corners=False)
    torch.testing.assert_close(frame.tensor, expected)
    seen = []
    hook = model.clip.visual.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    proposals = model.predict(images, COLOURS)
    hook.remove()
    assert seen == [(1, 3, 64, 96)] and proposals.mask_logits.shape[-2:] == (128, 192)
    probs = model.proposals(frame).mask_logits.sigmoid()
    probs = F.interpolate(probs, size=(128, 192), mode="bilinear", align_corners=False)
    torch.testing.assert_close(proposals.mask_logits.sigmoid(), probs, rtol=1e-4, atol=2e-6)
    # Results are at the size of the image, or at the one that is asked for.
    x = host_inputs((64, 96))[0]
    assert sem_seg(model, [{**x, "height": 33, "width": 50}])[0].shape == (4, 33, 50)
    del x["height"], x["width"]
    assert sem_seg(model, [x])[0].shape == (4, 64, 96)


@torch.no_grad()
def test_probabilities_of_masks_are_resized_to_the_results(dataset, own_clip):
    """Not their logits, as in FC-CLIP: an edge between a sure and an unsure mask would move."""
    model = random_maskclippp(generator_cfg("mask2former", dataset, own_clip)).eval()
    images = model.preprocess(host_inputs((64, 96)))
    mask_logits = model.predict(images, COLOURS).mask_logits
    sizes = {"padded_size": images.padded_size, "image_size": (64, 96), "output_size": (99, 130)}
    found = model.inference.resize(mask_logits[0], **sizes).sigmoid()
    expected = F.interpolate(mask_logits.sigmoid(), size=(99, 130), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


def test_generator_copy():
    images = ImageBatch(torch.randn(2, 3, 64, 96), [(50, 90), (64, 96)], ["a", "b"], ["one", None])
    assert GeneratorCopy()(images) is images
    copy = GeneratorCopy(resize="short", input_size=25, size_divisibility=8)(images)
    assert copy.image_sizes == [(25, 45), (25, 37)] and copy.padded_size == (32, 48)
    assert (copy.image_ids, copy.dataset_names) == (["a", "b"], ["one", None])
    assert not copy.tensor[1, :, :, 37:].any() and not copy.tensor[:, :, 25:].any()


@torch.no_grad()
def test_an_image_without_masks_from_a_file(dataset, own_clip):
    cfg = generator_cfg("precomputed", dataset, own_clip)
    cfg.MODEL.OVSEG.PROPOSALS.RESIDUAL_MASK = False
    model = random_maskclippp(cfg)
    batch = host_inputs(SIZES[0], SIZES[0])
    batch[0]["proposals"] = batch[0]["proposals"][:0]
    first, second = sem_seg(model, batch)
    assert first.isfinite().all() and float(first.abs().max()) < 1e-4
    torch.testing.assert_close(second, sem_seg(model, batch[1:])[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "fcclip",
            {"PROPOSALS.CLIP_NAME": "", "CLIP.NAME": "OVShapes-RN", "CLIP.TRAINABLE": "full"},
            "PROPOSALS.CLIP_NAME is '', but .* 'full' tunes the model's",
        ),
        ("fcclip", {"PROPOSALS.TEMPLATES": ["no place"]}, "PROPOSALS.TEMPLATES: 'no place' is neither a set"),
        (
            "precomputed",
            {"PROPOSALS.RESIZE": "short", "PROPOSALS.INPUT_SIZE": 9},
            "RESIZE is 'short', but the masks",
        ),
        ("mask2former", {"PROPOSALS.RESIZE": "square"}, "PROPOSALS.RESIZE: 'square'; expected one of none, short"),
        ("mask2former", {"PROPOSALS.RESIZE": "short"}, "PROPOSALS.INPUT_SIZE: 0; expected pixels"),
        ("precomputed", {"ENSEMBLE.NAME": "maskclippp"}, "ENSEMBLE.NAME is 'maskclippp', but Precomputed.* no classes"),
        ("mask2former", {"ENSEMBLE.NAME": "zsseg"}, "ENSEMBLE.NAME is 'zsseg'; allowed are none, maskclippp"),
    ],
)
def test_bad_input(dataset, own_clip, kind, changes, message):
    cfg = generator_cfg(kind, dataset, own_clip)
    for key, value in changes.items():
        block, name = key.split(".")
        cfg.MODEL.OVSEG[block][name] = value
    with pytest.raises(ValueError, match=message) as error:
        build_model(cfg)
    assert "\n" not in str(error.value)


def test_a_head_of_another_size(dataset, own_clip):
    cfg = generator_cfg("mask2former", dataset, own_clip)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 5
    with pytest.raises(ValueError, match="PROPOSALS.DATASET tiny_generator has 3 classes, but the class head .* has 5"):
        build_model(cfg)


def test_fcclip_itself_has_one_clip(own_clip):
    cfg = host_cfg("FCCLIPProposals")
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.OVSEG.PROPOSALS.CLASS_HEAD = "FCCLIP", "text"
    with pytest.raises(ValueError, match="PROPOSALS.CLIP_NAME: got 'OVShapes-RN'; FC-CLIP has one CLIP"):
        build_model(cfg)
