"""OpenVocabPredictor: config and weights in, results, pictures and plain data out."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from pycocotools import mask as coco_mask

from ovseg_d2.engine.load_config import load_config
from ovseg_d2.predictor import OpenVocabPredictor
from ovseg_d2.structures import Vocabulary
from tests.demo.tiny_model import CLASSES, DATASET, write_tiny_model

TASKS = ("semantic", "panoptic", "instance")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def predictor(folder):
    return OpenVocabPredictor.from_config_file(folder / "tiny.yaml", weights=folder / "tiny.pth", score_threshold=0.0)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)


def test_results_have_the_size_of_the_image(predictor, image):
    results = predictor(image)
    assert results["sem_seg"].shape == (3, 60, 90)
    assert results["panoptic_seg"][0].shape == (60, 90) and results["panoptic_seg"][1]
    assert results["instances"].pred_masks.shape[1:] == (60, 90)
    assert set(results["instances"].pred_classes.tolist()) <= {1, 2}  # things only
    assert not results["sem_seg"].requires_grad


@pytest.mark.parametrize("task", TASKS)
def test_pictures(predictor, image, task):
    picture = predictor.draw(image, predictor(image), task, scale=2)
    assert picture.shape == (120, 180, 3) and (picture[::2, ::2] != image).any()


def test_batch_equals_single(predictor, image):
    tall = np.ascontiguousarray(image.transpose(1, 0, 2))
    for results, single in zip(predictor.predict([image, image[::-1]]), [image, image[::-1]], strict=True):
        torch.testing.assert_close(results["sem_seg"], predictor(single)["sem_seg"], atol=1e-5, rtol=1e-4)
    # Of different sizes the smaller one is padded, which convolutions see; sizes of the results are each image's own.
    assert [r["sem_seg"].shape for r in predictor.predict([image, tall])] == [(3, 60, 90), (3, 90, 60)]


def test_channel_order_of_the_config(folder, predictor, image):
    swapped = OpenVocabPredictor.from_config_file(
        folder / "tiny.yaml", weights=folder / "tiny.pth", opts=["INPUT.FORMAT", "BGR"]
    )
    expected = predictor(image)["sem_seg"]
    torch.testing.assert_close(swapped(np.ascontiguousarray(image[:, :, ::-1]))["sem_seg"], expected)
    assert not torch.allclose(swapped(image)["sem_seg"], expected)


def test_score_threshold_and_tasks(folder, predictor, image):
    scores = predictor(image)["instances"].scores
    threshold = scores.median().item()
    strict = OpenVocabPredictor.from_config_file(
        folder / "tiny.yaml", weights=folder / "tiny.pth", tasks=["instance"], score_threshold=threshold
    )
    results = strict(image)
    assert set(results) == {"instances"}
    assert len(results["instances"]) == (scores >= threshold).sum() < len(scores)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools on numpy 2
def test_plain_data(predictor, image):
    results = predictor(image)
    content, labels = predictor.to_json(results, "semantic")
    assert sum(c["area"] for c in content["classes"]) == labels.size
    assert all(c["area"] == (labels == c["category_id"]).sum() for c in content["classes"])
    assert all(c["name"] == CLASSES[c["category_id"]] for c in content["classes"])

    content, ids = predictor.to_json(results, "panoptic")
    assert {s["id"] for s in content["segments_info"]} == set(np.unique(ids).tolist()) - {0}
    assert all(s["area"] == (ids == s["id"]).sum() for s in content["segments_info"])

    content, nothing = predictor.to_json(results, "instance")
    assert nothing is None
    for instance, mask in zip(content["instances"], results["instances"].pred_masks.numpy(), strict=True):
        assert (coco_mask.decode(instance["segmentation"]) == mask).all()
        assert instance["name"] == CLASSES[instance["category_id"]]
    json.dumps([predictor.to_json(results, task)[0] for task in TASKS], allow_nan=False)


def test_vocabulary(folder, image):
    renamed = Vocabulary(names=("lawn", "kitten", "puppy"), is_thing=(False, True, True))
    args = {"config_file": folder / "tiny.yaml", "weights": folder / "tiny.pth"}
    predictor = OpenVocabPredictor.from_config_file(**args, vocabulary=renamed)
    names = {c["name"] for c in predictor.to_json(predictor(image), "semantic")[0]["classes"]}
    assert names and names <= set(renamed.names)
    larger = Vocabulary(names=("a", "b", "c", "d"), is_thing=(True,) * 4)
    with pytest.raises(ValueError, match="Mask2Former has a closed vocabulary: the 3 classes .* but 4 classes"):
        OpenVocabPredictor.from_config_file(**args, vocabulary=larger)


def test_vocabulary_in_any_form(folder, image, tmp_path):
    predictor = OpenVocabPredictor.from_config_file(folder / "tiny.yaml", weights=folder / "tiny.pth")
    colors = predictor.drawer.class_colors
    expected = Vocabulary(names=("a", "b", "c"), is_thing=(True, False, True), synonyms=(("a", "x"), ("b",), ("c",)))
    (tmp_path / "classes.txt").write_text("a, x\nb:stuff\nc\n")
    for form in (["a, x", "b:stuff", "c"], "a, x | b:stuff | c", str(tmp_path / "classes.txt"), expected):
        predictor.set_vocabulary(form)
        assert predictor.vocabulary == expected and predictor.drawer.class_names == ("a", "b", "c")
    assert predictor.drawer.class_colors != colors and len(set(predictor.drawer.class_colors)) == 3
    assert predictor.draw(image, predictor(image), "panoptic").shape == image.shape
    predictor.set_vocabulary(DATASET)
    assert predictor.vocabulary.names == CLASSES and predictor.drawer.class_colors == colors


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("a, b", "3 classes .* but 2 classes"),
        ([], "no classes"),
        ("a,,b", "empty name"),
        (["a", "b", "a"], "class 3: 'a' is there already"),
        ("nowhere.txt", "nowhere.txt does not exist"),
    ],
)
def test_a_bad_vocabulary_changes_nothing(predictor, form, message):
    before, drawer = predictor.vocabulary, predictor.drawer
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        predictor.set_vocabulary(form)
    assert predictor.vocabulary is before and predictor.drawer is drawer


def test_another_vocabulary_encodes_texts_alone(folder, image, monkeypatch):
    """Of an open-vocabulary model; the picture is encoded once a call, the texts once a vocabulary."""
    opts = {
        "MODEL.META_ARCHITECTURE": "TrainingFree",
        "MODEL.OVSEG.CLIP.NAME": "OVShapes-ViT",
        "MODEL.OVSEG.TEXT.TEMPLATES": ["single"],
        "MODEL.OVSEG.TRAINING_FREE.CLASSIFY": "masks",
    }
    opts = [str(word) for pair in opts.items() for word in pair]
    cfg = load_config(folder / "tiny.yaml", opts)
    torch.save(build_model(cfg).state_dict(), folder / "open.pth")
    cfg.MODEL.WEIGHTS = str(folder / "open.pth")
    cfg.MODEL.OVSEG.CLIP.PRETRAINED = ""
    predictor = OpenVocabPredictor(cfg, vocabulary=["red star", "blue ring"], score_threshold=0.0)
    calls = Counter()

    def count(module, name):
        original = module.forward
        monkeypatch.setattr(module, "forward", lambda *a, **k: calls.update([name]) or original(*a, **k))

    count(predictor.model.clip.visual, "image")
    count(predictor.model.clip.text, "text")
    first = predictor(image)["sem_seg"]
    assert first.shape == (2, 60, 90) and calls == {"image": 1, "text": 1}
    predictor(image)
    assert calls == {"image": 2, "text": 1}
    predictor.set_vocabulary("blue ring, grass:stuff, red star")
    second = predictor(image)
    assert second["sem_seg"].shape == (3, 60, 90) and calls == {"image": 3, "text": 2}
    assert {s["isthing"] for s in second["panoptic_seg"][1]} <= {True, False}
    assert predictor.draw(image, second, "panoptic").shape == image.shape
    predictor.set_vocabulary(["red star", "blue ring"])
    torch.testing.assert_close(predictor(image)["sem_seg"], first)
    assert calls == {"image": 4, "text": 2}  # known from before


def test_bad_input(folder, predictor, image):
    with pytest.raises(ValueError, match=r"image has shape \(60, 90\) and type uint8, expected \(H, W, 3\) uint8"):
        predictor(image[..., 0])
    with pytest.raises(ValueError, match="expected .* uint8"):
        predictor(image.astype(np.float32))
    with pytest.raises(ValueError, match="no class names: DATASETS.TEST .*nowhere"):
        OpenVocabPredictor.from_config_file(
            folder / "tiny.yaml", opts=["DATASETS.TEST", "('nowhere',)", "DATASETS.TRAIN", "()"]
        )
