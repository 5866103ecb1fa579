"""Zero-shot splits: their checks, the public ones, and what the views of a dataset read from one folder of labels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ovseg_d2.data import check_dataset
from ovseg_d2.data.dataset_mapper import OVSegDatasetMapper
from ovseg_d2.data.datasets import register_from_entries, register_zero_shot
from ovseg_d2.data.datasets.class_tables import class_table
from ovseg_d2.data.datasets.zero_shot_splits import ZeroShotSplit, builtin_split, split_from_json
from ovseg_d2.data.vocabulary import vocabulary_from_metadata
from ovseg_d2.evaluation import SemSegEvaluator
from tests.data.coded_data import data_cfg, forget
from tests.evaluation.panoptic_files import sem_seg_output

NAMES = ("road", "cow", "car", "sky", "dog")


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Two images with the labels of all five classes, 8-bit, 255 unlabelled; registered names start with ``zs_``."""
    labels = np.array([[0, 1, 2, 3, 4, 255], [4, 4, 1, 1, 0, 0]], np.uint8)
    write_pair(tmp_path, "b", labels)
    write_pair(tmp_path, "a", labels[::-1])
    yield {"image_root": str(tmp_path / "images"), "semantic_root": str(tmp_path / "labels")}
    for name in [name for name in DatasetCatalog.list() if name.startswith("zs_")]:
        forget(name)


def write_pair(root: Path, stem: str, labels: np.ndarray, suffix: str = "png") -> None:
    for folder in ("images", "labels"):
        (root / folder).mkdir(exist_ok=True)
    Image.fromarray(np.zeros((*labels.shape, 3), np.uint8)).save(root / "images" / f"{stem}.jpg")
    Image.fromarray(np.ascontiguousarray(labels)).save(root / "labels" / f"{stem}.{suffix}")


def train_targets(name: str, *overrides: Any) -> list[dict[str, Any]]:
    cfg = data_cfg(name, "INPUT.TARGETS", "semantic", *overrides)
    mapper = OVSegDatasetMapper(cfg, is_train=True, dataset_names=name)
    return [mapper({**record, "dataset_name": name}) for record in DatasetCatalog.get(name)]


@pytest.mark.parametrize(
    ("table", "num_seen", "num_unseen", "unseen_ids"),
    [
        ("coco_stuff_171", 156, 15, [19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160]),
        ("voc_20", 15, 5, [15, 16, 17, 18, 19]),
        ("ade20k_150", 135, 15, [9, 15, 30, 37, 49, 60, 74, 81, 89, 99, 112, 128, 136, 143, 149]),
        ("ade20k_847", 572, 275, None),
        ("pascal_context_59", 49, 10, [0, 6, 7, 14, 19, 24, 31, 33, 48, 54]),
    ],
)
def test_public_splits(table: str, num_seen: int, num_unseen: int, unseen_ids: list[int] | None) -> None:
    split = builtin_split(table)
    assert (len(split.seen), len(split.unseen), sum(split.is_seen)) == (num_seen, num_unseen, num_seen)
    if unseen_ids is not None:
        assert list(split.label_ids("unseen")) == unseen_ids
    # ZegFormer's order: the seen in their order, then the unseen.
    assert split.label_ids("all", seen_first=True) == split.label_ids("seen") + split.label_ids("unseen")


def test_tables() -> None:
    coco = class_table("coco_stuff_171")
    assert len({row["id"] for row in coco}) == 171 and sum(row["isthing"] for row in coco) == 80
    # The label maps hold id - 1; these are the values of the unseen classes that ZSSeg's script lists.
    unseen = set(builtin_split("coco_stuff_171").unseen)
    values = [row["id"] - 1 for row in coco if row["name"] in unseen]
    assert values == [20, 24, 32, 33, 40, 56, 86, 99, 105, 123, 144, 147, 148, 168, 171]
    assert len(class_table("pascal_context_459")) == 459 and len(class_table("ade20k_847")) == 847
    # The 59 classes are among the 459 under their own names, but for one.
    all_names = {row["id"]: row["name"] for row in class_table("pascal_context_459")}
    picked = class_table("pascal_context_59")
    assert len(picked) == 59
    renamed = [(row["name"], all_names[row["id"]]) for row in picked if row["name"] != all_names[row["id"]]]
    assert renamed == [("diningtable", "table")]
    with pytest.raises(ValueError, match=r"class table 'coco' is unknown; expected one of ade20k_150, "):
        class_table("coco")
    with pytest.raises(
        ValueError, match=r"no zero-shot split of 'pascal_context_459' is built in; expected one of coco"
    ):
        builtin_split("pascal_context_459")


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"unseen": ["cow"], "seen": ["road", "cow", "car", "sky", "dog"]}, "seen and unseen overlap in 'cow'$"),
        ({"unseen": ["cow", "zebra", "yak"]}, "the dataset's 5 classes lack unseen 'zebra', 'yak'$"),
        ({"unseen": ["cow"], "seen": ["road", "car", "sky", "dog", "bus"]}, "lack seen 'bus'$"),
        ({"unseen": ["cow"], "seen": ["road", "car"]}, "neither seen nor unseen is 'sky', 'dog'$"),
        ({"unseen": ["cow", "dog", "cow"]}, "unseen repeats 'cow'$"),
        ({"unseen": []}, "no class is unseen; expected at least one$"),
        ({"unseen": list(NAMES)}, "no class is seen; expected at least one$"),
        ({"unseen": [f"u{i}" for i in range(20)]}, "'u7' and 12 more$"),
        ({"seen": ["road"]}, r"expected an object with 'unseen' and maybe 'seen', found \['seen'\]$"),
        ({"unseen": ["cow"], "novel": []}, r"found \['novel', 'unseen'\]$"),
        ({"unseen": "cow"}, "'unseen' is 'cow'; expected a list of class names or numbers$"),
        ({"unseen": [True]}, r"'unseen' is \[True\]; expected a list of class names or numbers$"),
        ({"unseen": [1, 5]}, "unseen has class 5, expected a name or 0..4$"),
        ({"unseen": ["cow"], "seen": [0, -1]}, "seen has class -1, expected a name or 0..4$"),
        ({"unseen": ["cow", 1]}, "unseen repeats 'cow'$"),
        (["cow"], "found a list$"),
    ],
)
def test_bad_split_files(tmp_path: Path, lists: Any, message: str) -> None:
    path = tmp_path / "split.json"
    path.write_text(json.dumps(lists))
    with pytest.raises(ValueError, match=message) as caught:
        split_from_json(str(path), NAMES)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_split_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.json does not exist"):
        split_from_json(str(tmp_path / "none.json"), NAMES)


def test_training_sees_the_seen_classes_only(folders: dict[str, str]) -> None:
    register_zero_shot(name="zs_train", **folders, classes=NAMES, unseen=["cow", "sky"], subset="seen")
    vocabulary = vocabulary_from_metadata(MetadataCatalog.get("zs_train"))
    assert vocabulary.names == ("road", "car", "dog") and vocabulary.is_seen == (True, True, True)
    _, record = train_targets("zs_train")
    assert record["sem_seg"].tolist() == [[0, 255, 1, 255, 2, 255], [2, 2, 255, 255, 0, 0]]
    assert record["instances"].gt_classes.tolist() == [0, 1, 2]
    assert record["instances"].gt_masks.tensor[2].tolist() == [
        [False, False, False, False, True, False],
        [True, True, False, False, False, False],
    ]


def test_an_image_of_unseen_classes_has_no_targets(folders: dict[str, str], tmp_path: Path) -> None:
    write_pair(tmp_path, "c", np.array([[1, 3], [255, 1]], np.uint8))
    register_zero_shot(name="zs_train", **folders, classes=NAMES, unseen=["cow", "sky"], subset="seen")
    record = train_targets("zs_train")[2]
    assert len(record["instances"]) == 0 and (record["sem_seg"] == 255).all()


def test_generalised_evaluation(folders: dict[str, str]) -> None:
    register_zero_shot(name="zs_val", **folders, classes=NAMES, unseen=["cow", "sky"])
    metadata = MetadataCatalog.get("zs_val")
    assert metadata.stuff_classes == list(NAMES) and metadata.class_is_seen == [True, False, True, False, True]
    scores = evaluate("zs_val", np.array([[0, 1, 2, 3, 4, 0], [4, 4, 1, 0, 0, 0]]))
    # road: 3 of 4 (one predicted on a cow); cow: 2 of 3; sky, car and dog are right.
    assert scores["mIoU_seen"] == pytest.approx(100 * (3 / 4 + 2) / 3)
    assert scores["mIoU_unseen"] == pytest.approx(100 * (2 / 3 + 1) / 2)


@pytest.mark.parametrize(("subset", "pred"), [("unseen", [[9, 0, 9, 1, 9, 9], [9, 9, 0, 0, 9, 9]])])
def test_evaluation_of_a_part(folders: dict[str, str], subset: str, pred: list[list[int]]) -> None:
    """Pixels of other classes do not count, whatever is predicted there."""
    register_zero_shot(name="zs_part", **folders, classes=NAMES, unseen=["cow", "sky"], subset=subset)
    labels = np.array(pred)
    assert evaluate("zs_part", np.where(labels == 9, 1, labels))["mIoU"] == 100


def evaluate(name: str, pred: np.ndarray) -> dict[str, float]:
    record = DatasetCatalog.get(name)[1]
    evaluator = SemSegEvaluator(dataset_name=name)
    evaluator.process([record], [sem_seg_output(pred, num_classes=len(MetadataCatalog.get(name).stuff_classes))])
    return evaluator.evaluate()["sem_seg"]


def test_labels_outside_the_table(folders: dict[str, str], tmp_path: Path) -> None:
    register_zero_shot(name="zs_train", **folders, classes=NAMES, unseen=["cow"], subset="seen")
    write_pair(tmp_path, "b", np.array([[0, 5]], np.uint8))
    with pytest.raises(
        ValueError, match=r"b.png has label 5 \(\d+ pixels?\), expected 0..4 or the ignore label 255 of 'zs_train'"
    ):
        train_targets("zs_train")
    with pytest.raises(ValueError, match=r"b.png has label 5 \(1 pixel\), expected 0..4 or the ignore label 255"):
        evaluate("zs_train", np.array([[0, 1]]))


def test_sixteen_bit_labels(tmp_path: Path) -> None:
    """The 847 classes of ADE20K: 255 is a class there, and numbers above it must survive training and evaluation."""
    split = builtin_split("ade20k_847")
    seen, unseen = split.label_ids("seen"), split.label_ids("unseen")
    labels = np.array([[seen[255], seen[-1], unseen[-1]], [65535, seen[0], unseen[0]]], np.uint16)
    write_pair(tmp_path, "a", labels, "tif")
    files = {"image_root": str(tmp_path / "images"), "semantic_root": str(tmp_path / "labels"), "ignore_label": 65535}
    try:
        register_zero_shot(name="zs_train", classes="ade20k_847", subset="seen", **files)
        register_zero_shot(name="zs_val", classes="ade20k_847", **files)
        with pytest.raises(ValueError, match=r"IGNORE_VALUE is 255, a class of dataset 'zs_train'"):
            train_targets("zs_train")
        (record,) = train_targets("zs_train", "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 65535)
        assert record["sem_seg"].tolist() == [[255, 571, 65535], [65535, 0, 65535]]
        assert sorted(record["instances"].gt_classes.tolist()) == [0, 255, 571]
        resized = ["INPUT.MIN_SIZE_TRAIN", (4,), "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 65535]
        (record,) = train_targets("zs_train", *resized)
        assert record["sem_seg"].shape == (4, 6) and set(record["sem_seg"].unique().tolist()) == {0, 255, 571, 65535}
        (record,) = DatasetCatalog.get("zs_val")
        evaluator = SemSegEvaluator(dataset_name="zs_val")
        pred = np.where(labels == 65535, 0, labels).astype(np.int64)
        evaluator.process([record], [sem_seg_output(pred, num_classes=847)])
        scores = evaluator.evaluate()["sem_seg"]
        assert scores["mIoU_seen"] == scores["mIoU_unseen"] == scores["hIoU"] == scores["pACC"] == 100
    finally:
        forget("zs_train")
        forget("zs_val")


def test_entries_of_a_configuration(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "split.json").write_text('{"unseen": ["cow", "sky"]}')
    entry = {"kind": "zero_shot", "image_root": "images", "semantic_root": "labels", "classes": list(NAMES)}
    register_from_entries([{**entry, "name": "zs_file", "split_json": "split.json", "subset": "seen"}])
    register_from_entries([{**entry, "name": "zs_list", "unseen": ["cow", "sky"], "subset": "seen"}])
    register_from_entries([{**entry, "name": "zs_numbers", "unseen": [1, 3], "subset": "seen"}])
    for kind in ("file", "list", "numbers"):
        assert MetadataCatalog.get(f"zs_{kind}").stuff_classes == ["road", "car", "dog"]
    check_dataset(data_cfg("zs_file", "INPUT.TARGETS", "semantic", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3), "zs_file")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unseen": ["zebra"]}, r"dataset 'zs_bad': the dataset's 5 classes lack unseen 'zebra'"),
        ({"unseen": [1, 171]}, "dataset 'zs_bad': unseen has class 171, expected a name or 0..4$"),
        ({"unseen": ["cow"], "split_json": "s.json"}, "'zs_bad' has unseen and split_json; expected one of them"),
        ({}, "'zs_bad' has no split; expected unseen .* or split_json"),
        ({"unseen": ["cow"], "subset": "base"}, "subset is 'base'; expected one of all, seen, unseen"),
        ({"unsen": ["cow"]}, r"DATASETS.REGISTER\[0\] \(zero_shot\): .*'unsen'"),
        ({"classes": "voc"}, "class table 'voc' is unknown"),
    ],
)
def test_bad_entries(folders: dict[str, str], arguments: dict[str, Any], message: str) -> None:
    entry = {"kind": "zero_shot", "name": "zs_bad", "classes": list(NAMES), **folders, **arguments}
    with pytest.raises(ValueError, match=message):
        register_from_entries([entry])
    assert "zs_bad" not in DatasetCatalog.list()


def test_training_on_unseen_classes_alone(folders: dict[str, str]) -> None:
    register_zero_shot(name="zs_novel", **folders, classes=NAMES, unseen=["cow", "sky"], subset="unseen")
    overrides = ["INPUT.TARGETS", "semantic", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2]
    with pytest.raises(
        ValueError, match=r"DATASETS.TRAIN has 'zs_novel', whose 2 classes \(cow, sky, ...\) are all unseen"
    ):
        check_dataset(data_cfg("zs_novel", *overrides), "zs_novel")
    check_dataset(data_cfg("zs_novel", *overrides, "DATASETS.TRAIN", ()), "zs_novel")


def test_label_ids_are_checked() -> None:
    split = ZeroShotSplit(classes=NAMES, unseen=("dog",))
    assert split.seen == ("road", "cow", "car", "sky") and split.label_ids("unseen") == (4,)
    with pytest.raises(ValueError, match="subset is 'novel'"):
        split.label_ids("novel")
