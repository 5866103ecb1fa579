"""Which classes count as seen: a zero-shot split, or relative to the classes of the training data."""

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog

from ovseg_d2.data.datasets.class_tables import class_names
from ovseg_d2.data.vocabulary import training_vocabulary
from ovseg_d2.evaluation import build_evaluator
from ovseg_d2.evaluation.class_scores import seen_means, seen_split
from ovseg_d2.structures import Vocabulary
from tests.evaluation.panoptic_files import CAT, DOG, GRASS, make_dataset, painted, sem_seg_output
from tests.evaluation.test_build import config


def vocabulary(*classes: str, is_seen: tuple[bool, ...] = ()) -> Vocabulary:
    synonyms = tuple(tuple(entry.split("/")) for entry in classes)
    names = tuple(texts[0] for texts in synonyms)
    return Vocabulary(names=names, is_thing=(True,) * len(names), synonyms=synonyms, is_seen=is_seen)


def test_a_synonym_in_common():
    trained = vocabulary("couch/sofa", "tree", "wall")
    assert seen_split(vocabulary("sofa", "armchair", "wall/brick wall", "Tree"), trained) == (True, False, True, False)


def test_no_split():
    trained = vocabulary("a", "b/c")
    assert seen_split(trained, trained) is None
    assert seen_split(vocabulary("c", "a"), trained) is None  # all of them
    assert seen_split(vocabulary("x"), trained) is None  # none
    assert seen_split(vocabulary("a", "x"), None) is None
    assert seen_split(vocabulary("a", "x", is_seen=(False, True)), trained) == (False, True)  # the dataset's own


def test_means():
    values = np.array([0.2, np.nan, 0.6, 0.4])
    seen, unseen, harmonic = seen_means(values, [True, True, False, True])
    assert (seen, unseen) == (pytest.approx(0.3), 0.6) and harmonic == pytest.approx(0.4)
    assert np.isnan(seen_means(values, [True] * 4)[1:]).all()
    assert seen_means(np.zeros(2), [True, False]) == (0, 0, 0)


# With the public tables of synonyms, which the package does not have: 64, 101, 85, 51, 20; COCO-Stuff 67, 115, 94, 51,
# 20. The package's tables have one name a class, and those of the datasets themselves: "building-other-merged",
# "road, route", "tvmonitor".
@pytest.mark.parametrize(
    ("trained", "expected"),
    [("coco_panoptic", (31, 38, 55, 27, 14)), ("coco_stuff_171", (40, 52, 74, 35, 14))],
)
def test_class_tables(trained, expected):
    tables = ("ade20k_150", "ade20k_847", "pascal_context_459", "pascal_context_59", "voc_20")
    known = vocabulary_of(trained)
    assert tuple(sum(seen_split(vocabulary_of(name), known)) for name in tables) == expected
    assert seen_split(known, known) is None


def vocabulary_of(table: str) -> Vocabulary:
    names = tuple(dict.fromkeys(class_names(table)))
    return Vocabulary(names=names, is_thing=(True,) * len(names))


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path, [(painted("1122 3333"), {1: CAT, 2: GRASS, 3: DOG})])


def test_miou_relative_to_the_training_classes(dataset):
    MetadataCatalog.get(f"{dataset.name}_train").set(
        thing_classes=["kitty", "road"], class_synonyms=[["kitty", "cat"], ["road", "grass"]]
    )
    cfg = config("semantic", oracle="iou", train=(f"{dataset.name}_train", "another"))
    evaluator = build_evaluator(cfg, dataset.name)
    labels = np.array([[CAT, CAT, CAT, GRASS], [DOG, DOG, CAT, CAT]])
    result = {**sem_seg_output(labels), "mask_probs": torch.zeros(0, 2, 4)}
    evaluator.process(dataset.inputs, [result])
    scores = evaluator.evaluate()
    assert scores["sem_seg"]["mIoU_seen"] == pytest.approx(100 * (2 / 5 + 1 / 2) / 2)
    assert scores["sem_seg"]["mIoU_unseen"] == pytest.approx(50)
    assert {"mIoU_seen", "mIoU_unseen", "hIoU"} < scores["sem_seg_oracle"].keys()


@pytest.mark.parametrize("train", [(), ("not registered",), "itself"])
def test_no_split_of_known_or_nameless_classes(dataset, train):
    train = (dataset.name,) if train == "itself" else train
    evaluator = build_evaluator(config("semantic", train=train), dataset.name)
    evaluator.process(dataset.inputs, [sem_seg_output(np.zeros((2, 4), int))])
    assert not {"mIoU_seen", "hIoU"} & evaluator.evaluate()["sem_seg"].keys()
    assert (training_vocabulary(train) is None) == (train != (dataset.name,))
