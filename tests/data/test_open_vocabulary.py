"""Registrations of COCO-Stuff, VOC, Pascal Context and the full ADE20K in the layouts of the public projects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ovseg_d2.data import OVSegDatasetMapper
from ovseg_d2.data.datasets import dataset_root, open_vocabulary
from ovseg_d2.data.datasets.class_tables import open_vocabulary_texts
from ovseg_d2.data.vocabulary import vocabulary_from_metadata
from tests.data.coded_data import data_cfg, forget

PREFIXES = ("coco_2017_train_stuff", "coco_2017_test_stuff", "coco_2017_val_", "voc_", "pascal_voc", "pcontext")
PREFIXES += ("context_",)
KEEP = "coco_2017_val_panoptic"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """An empty folder to register from; the usual registrations come back afterwards."""
    names = [n for n in DatasetCatalog.list() if n.startswith(PREFIXES) and not n.startswith(KEEP)]
    names = [n for n in names if n.endswith("sem_seg") or "_sem_seg_" in n]
    for name in names:
        forget(name)
    yield tmp_path
    for name in names:
        forget(name)
    register_all(dataset_root())


def register_all(root: str | Path) -> None:
    open_vocabulary.register_labelled_images(str(root))


@pytest.mark.parametrize(
    ("name", "num_classes", "num_seen", "ignore_label", "folder"),
    [
        ("coco_2017_train_stuff_sem_seg", 171, 156, 255, "coco/stuffthingmaps_detectron2/train2017"),
        ("coco_2017_train_stuff_base_sem_seg", 156, 156, 255, "coco/stuffthingmaps_detectron2/train2017"),
        ("coco_2017_test_stuff_sem_seg", 171, 156, 255, "coco/stuffthingmaps_detectron2/val2017"),
        ("coco_2017_test_stuff_novel_sem_seg", 15, 0, 255, "coco/stuffthingmaps_detectron2/val2017"),
        ("coco_2017_train_stuff_seen_sem_seg", 156, 156, 255, "coco/stuffthingmaps_detectron2/train2017"),
        ("coco_2017_val_unseen_stuff_seen_sem_seg", 15, 0, 255, "coco/stuffthingmaps_detectron2/val2017"),
        ("coco_2017_val_all_stuff_sem_seg", 171, 156, 255, "coco/stuffthingmaps_detectron2/val2017"),
        ("voc_base_sem_seg_train", 15, 15, 255, "VOCdevkit/VOC2012/annotations_ovs/train"),
        ("voc_sem_seg_test", 20, 15, 255, "VOCdevkit/VOC2012/annotations_ovs/val"),
        ("voc_sem_seg_val", 20, None, 255, "VOCdevkit/VOC2012/annotations_ovs/val"),
        ("voc_background_sem_seg_val", 59, None, 255, "VOCdevkit/VOC2012/annotations_ovs_background/val"),
        ("pascal_voc_val_all_sem_seg", 20, 15, 255, "VOCdevkit/VOC2012/annotations_ovs/val"),
        ("pcontext_sem_seg_val", 59, None, 255, "VOC2010/annotations_detectron2_ovs/pc59_val"),
        ("pcontext_base_sem_seg_train", 49, 49, 255, "VOC2010/annotations_detectron2_ovs/pc59_train"),
        ("pcontext_zero_shot_sem_seg_train", 59, 49, 255, "VOC2010/annotations_detectron2_ovs/pc59_train"),
        ("pcontext_zero_shot_sem_seg_val", 59, 49, 255, "VOC2010/annotations_detectron2_ovs/pc59_val"),
        ("pcontext_full_sem_seg_val", 459, None, 65535, "VOC2010/annotations_detectron2_ovs/pc459_val"),
        ("ade20k_full_sem_seg_val", 847, None, 65535, "ADE20K_2021_17_01/annotations_detectron2/validation"),
        ("ade20k_full_sem_seg_freq_train", 572, 572, 65535, "ADE20K_2021_17_01/annotations_detectron2/training"),
        ("ade20k_full_sem_seg_freq_val_all", 847, 572, 65535, "ADE20K_2021_17_01/annotations_detectron2/validation"),
        ("ade20k_base_sem_seg_train", 135, 135, 255, "ADEChallengeData2016/annotations_detectron2/training"),
        ("coco_2017_train_stuff_all_sem_seg", 171, None, 255, "coco/stuffthingmaps_detectron2/train2017"),
        ("coco_2017_test_stuff_all_sem_seg", 171, None, 255, "coco/stuffthingmaps_detectron2/val2017"),
        ("ade20k_150_test_sem_seg", 150, None, 255, "ADEChallengeData2016/annotations_detectron2/validation"),
        ("voc_2012_test_sem_seg", 20, None, 255, "VOCdevkit/VOC2012/annotations_ovs/val"),
        ("voc_2012_test_background_sem_seg", 59, None, 255, "VOCdevkit/VOC2012/annotations_ovs_background/val"),
        ("context_59_test_sem_seg", 59, None, 255, "VOC2010/annotations_detectron2_ovs/pc59_val"),
        ("context_459_test_sem_seg", 459, None, 65535, "VOC2010/annotations_detectron2_ovs/pc459_val"),
        ("ade20k_zero_shot_sem_seg_val", 150, 135, 255, "ADEChallengeData2016/annotations_detectron2/validation"),
    ],
)
def test_registered(name: str, num_classes: int, num_seen: int | None, ignore_label: int, folder: str) -> None:
    metadata = MetadataCatalog.get(name)
    vocabulary = vocabulary_from_metadata(metadata)
    assert len(vocabulary) == len(metadata.stuff_colors) == num_classes
    assert (sum(vocabulary.is_seen) if vocabulary.is_seen else None) == num_seen
    assert (metadata.ignore_label, metadata.evaluator_type) == (ignore_label, "sem_seg")
    assert metadata.prepare_hint.startswith("python datasets/prepare_")
    if not folder.startswith("VOC"):  # those depend on what is there, see below
        assert metadata.sem_seg_root == str(Path(dataset_root(), folder))


def test_names_and_orders() -> None:
    test = MetadataCatalog.get("coco_2017_test_stuff_sem_seg")
    zegformer = MetadataCatalog.get("coco_2017_val_all_stuff_sem_seg")
    seen = [name for name, flag in zip(test.stuff_classes, test.class_is_seen, strict=True) if flag]
    assert (
        zegformer.stuff_classes[:156] == seen == MetadataCatalog.get("coco_2017_train_stuff_base_sem_seg").stuff_classes
    )
    assert zegformer.stuff_classes[156:] == MetadataCatalog.get("coco_2017_test_stuff_novel_sem_seg").stuff_classes
    things = [test.stuff_classes[i] for i in test.evaluation_set["novel_thing"]]
    assert things == ["cow", "giraffe", "suitcase", "frisbee", "skateboard", "carrot", "scissors"]
    assert len(test.evaluation_set["novel_stuff"]) == 8 and len(test.evaluation_set["base"]) == 156
    assert MetadataCatalog.get("voc_sem_seg_val").stuff_classes[-1] == "tv"
    assert MetadataCatalog.get("voc_sem_seg_test").stuff_classes[-1] == "tvmonitor"
    assert MetadataCatalog.get("pascal_voc_val_all_sem_seg").stuff_classes[15] == "potted plant"
    assert MetadataCatalog.get("pascal_voc_val_all_sem_seg").class_is_seen == [True] * 15 + [False] * 5


def test_background_has_many_names_and_is_no_target(root: Path) -> None:
    register_all(root)
    names = MetadataCatalog.get("voc_background_sem_seg_val").stuff_classes
    assert names[:20] == MetadataCatalog.get("voc_sem_seg_val").stuff_classes and len(set(names)) == 59
    assert names[20:22] == ["bag", "bed"]
    base = root / "VOCdevkit" / "VOC2012"
    for path, pixels in (
        (base / "JPEGImages" / "1.jpg", np.zeros((1, 4, 3), np.uint8)),
        (base / "annotations_ovs_background" / "val" / "1.png", np.array([[0, 19, 20, 255]], np.uint8)),
    ):
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path)
    assert train_labels("voc_background_sem_seg_val") == [0, 19, 255, 255]


def write_coco(root: Path, folder: str, labels: list[int]) -> None:
    for path, pixels in (
        (root / "coco" / "train2017", np.zeros((1, len(labels), 3), np.uint8)),
        (root / "coco" / "stuffthingmaps_detectron2" / folder, np.array([labels], np.uint8)),
    ):
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path / f"1.{'jpg' if pixels.ndim == 3 else 'png'}")


def train_labels(name: str) -> list[int]:
    (record,) = DatasetCatalog.get(name)
    mapper = OVSegDatasetMapper(data_cfg(name, "INPUT.TARGETS", "semantic"), is_train=True, dataset_names=name)
    return mapper({**record, "dataset_name": name})["sem_seg"][0].tolist()


def test_base_set_from_the_labels_of_all_classes(root: Path) -> None:
    write_coco(root, "train2017", [18, 19, 20, 170, 255])  # 19 is cow, the first unseen class
    register_all(root)
    assert train_labels("coco_2017_train_stuff_base_sem_seg") == [18, 255, 19, 155, 255]
    assert train_labels("coco_2017_train_stuff_novel_sem_seg") == [255, 0, 255, 255, 255]
    assert train_labels("coco_2017_train_stuff_sem_seg") == [18, 19, 20, 170, 255]


def test_published_folder_is_preferred(root: Path) -> None:
    write_coco(root, "train2017", [0, 0, 0])
    write_coco(root, "train2017_base", [19, 155, 255])  # ZSSeg's contiguous numbers
    register_all(root)
    assert train_labels("coco_2017_train_stuff_base_sem_seg") == [19, 155, 255]
    assert train_labels("coco_2017_train_stuff_seen_sem_seg") == [0, 0, 0]


def test_own_folders(root: Path) -> None:
    register_all(root)
    for name, folder in (
        ("voc_base_sem_seg_train", "VOCdevkit/VOC2012/annotations_ovs/train"),
        ("voc_sem_seg_test", "VOCdevkit/VOC2012/annotations_ovs/val"),
        ("pcontext_sem_seg_val", "VOC2010/annotations_detectron2_ovs/pc59_val"),
        ("pcontext_full_sem_seg_val", "VOC2010/annotations_detectron2_ovs/pc459_val"),
    ):
        assert MetadataCatalog.get(name).sem_seg_root == str(root / folder)


def test_folders_of_other_projects(root: Path) -> None:
    (root / "VOC2012" / "annotations_detectron2" / "val").mkdir(parents=True)
    (root / "VOC2010" / "val" / "image").mkdir(parents=True)
    register_all(root)
    voc = MetadataCatalog.get("voc_sem_seg_test")
    assert voc.sem_seg_root == str(root / "VOC2012" / "annotations_detectron2" / "val")
    assert voc.image_root == str(root / "VOC2012" / "JPEGImages")
    assert MetadataCatalog.get("pcontext_sem_seg_val").image_root == str(root / "VOC2010" / "val" / "image")
    assert MetadataCatalog.get("pcontext_sem_seg_train").image_root == str(root / "VOC2010" / "JPEGImages")


@pytest.mark.parametrize(
    ("files", "val", "train"),
    [
        # ZSSeg's folders below, and CAT-Seg's labels of the validation images right in it: the same folder.
        (["val/1.png", "train/2.png"], "val", "train"),
        (["val/1.png", "1.png"], "val", None),
        (["1.png"], "", None),
        (["train/2.png", "1.png"], "", "train"),
        # No label of a validation image: nothing to confuse with one.
        (["train/2.png"], None, "train"),
    ],
)
def test_one_folder_of_two_projects(root: Path, files: list[str], val: str | None, train: str | None) -> None:
    base = root / "VOCdevkit" / "VOC2012"
    for file in files:
        path = base / "annotations_detectron2" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    register_all(root)
    for name, folder in (("voc_sem_seg_test", val), ("voc_2012_test_sem_seg", val), ("voc_sem_seg_train", train)):
        part = "train" if name.endswith("train") else "val"
        expected = f"annotations_ovs/{part}" if folder is None else f"annotations_detectron2/{folder}"
        assert MetadataCatalog.get(name).sem_seg_root == str(base / expected)


def test_a_folder_with_files_is_preferred_to_an_empty_one(root: Path) -> None:
    ours, theirs = (
        root / "VOCdevkit" / "VOC2012" / folder for folder in ("annotations_ovs/val", "annotations_detectron2")
    )
    for folder in (ours, theirs):
        folder.mkdir(parents=True)
    register_all(root)
    assert MetadataCatalog.get("voc_sem_seg_val").sem_seg_root == str(ours)
    (theirs / "1.png").touch()
    forget("voc_sem_seg_val")
    register_all(root)
    assert MetadataCatalog.get("voc_sem_seg_val").sem_seg_root == str(theirs)


def test_folders_of_fcclip(root: Path) -> None:
    """Its files of the 21 classes hold the classes themselves, with background first; ours, background last."""
    register_all(root)
    assert MetadataCatalog.get("voc_21_sem_seg_val").semantic_label_ids == [20, *range(20)]
    for name in ("voc_21_sem_seg_val", "voc_sem_seg_val", "pcontext_full_sem_seg_val"):
        forget(name)
    for folder in ("pascal_voc_d2/annotations_pascal21", "pascal_voc_d2/annotations_pascal20"):
        (root / folder / "validation").mkdir(parents=True)
    (root / "pascal_ctx_d2" / "annotations_ctx459" / "validation").mkdir(parents=True)
    register_all(root)
    metadata = MetadataCatalog.get("voc_21_sem_seg_val")
    assert metadata.stuff_classes[:2] == ["background", "aeroplane"] and not hasattr(metadata, "semantic_label_ids")
    assert metadata.sem_seg_root == str(root / "pascal_voc_d2" / "annotations_pascal21" / "validation")
    assert metadata.image_root == str(root / "pascal_voc_d2" / "images" / "validation")
    assert MetadataCatalog.get("voc_sem_seg_val").sem_seg_root.endswith("pascal_voc_d2/annotations_pascal20/validation")
    context = MetadataCatalog.get("pcontext_full_sem_seg_val")
    assert (context.sem_seg_root, context.ignore_label) == (
        str(root / "pascal_ctx_d2" / "annotations_ctx459" / "validation"),
        65535,
    )


def test_views_with_synonyms() -> None:
    view = vocabulary_from_metadata(MetadataCatalog.get("openvocab_coco_2017_val_panoptic_with_sem_seg"))
    plain = vocabulary_from_metadata(MetadataCatalog.get("coco_2017_val_panoptic_with_sem_seg"))
    assert view.names == plain.names and plain.synonyms == tuple((name,) for name in plain.names)
    texts = dict(zip(view.names, view.synonyms, strict=True))
    assert texts["wall-brick"] == ("brick wall",) and texts["person"][:2] == ("person", "people")
    stuff = vocabulary_from_metadata(MetadataCatalog.get("openvocab_coco_2017_val_stuff_sem_seg"))
    assert stuff.is_seen == () and MetadataCatalog.get("coco_2017_test_stuff_sem_seg").class_is_seen
    background = MetadataCatalog.get("openvocab_pascal21_sem_seg_val").class_synonyms[0]
    assert background[0] == "background" and {"sky", "wall", "grass"} < set(background) and "person" not in background


def test_texts() -> None:
    assert open_vocabulary_texts(["road, route", "tv", "sofa"]) == [
        ["road", "route", "street"],
        ["tv", "television"],
        ["sofa", "couch"],
    ]
    # What is another class's own name is no synonym.
    assert open_vocabulary_texts(["sofa", "couch"]) == [["sofa"], ["couch"]]


def test_tables_name_their_source() -> None:
    folder = Path(open_vocabulary.__file__).parent / "class_names"
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["source"], path
