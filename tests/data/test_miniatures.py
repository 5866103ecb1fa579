"""Every dataset from its download to its scores: prepare, register, check, mapper, evaluator."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from detectron2.structures import Instances
from PIL import Image

from ovseg_d2.data import OVSegDatasetMapper
from ovseg_d2.data.check import load_dataset_dicts
from ovseg_d2.data.check.__main__ import main as check
from ovseg_d2.data.check.on_disk import project_datasets
from ovseg_d2.data.datasets import register_all
from ovseg_d2.data.datasets.open_vocabulary import register_labelled_images
from ovseg_d2.data.image_io import read_image
from ovseg_d2.data.vocabulary import vocabulary_from_metadata
from ovseg_d2.evaluation import build_evaluator
from ovseg_d2.evaluation.build import EVALUATORS
from ovseg_d2.structures import Vocabulary
from tests.data.coded_data import data_cfg
from tests.data.miniatures import WORLD, Miniatures, Truth, load_script

NAMES = [name for name in project_datasets() if not name.startswith("ovshapes_") or name.endswith("val")]
NAMES += [f"ovshapes_{view}" for view in ("val_instance", "val_sem_seg", "train_seen", "train_seen_sem_seg")]
HAS_CITYSCAPES = find_spec("cityscapesscripts") is not None
TARGETS = {"panoptic": "panoptic", "sem_seg": "semantic", "instance": "instance", "coco": "instance"}
#: What the results call each task, and its headline.
HEADLINES = {
    "sem_seg": {"mIoU": 1, "IoU": 1},
    "panoptic_seg": {"PQ": 1},
    "segm": {"AP": 1},
}
#: The same class under the names of other tables, or what stands for it there.
OTHER_NAMES = {
    "tvmonitor": ["tv"],
    "pottedplant": ["potted plant"],
    "table": ["diningtable"],
    "background": ["bag"],
}
#: CAT-Seg's folders, each with ours that holds the same.
CATSEG_FOLDERS = {
    "coco-stuff/images": "coco",
    "coco-stuff/annotations_detectron2": "coco/stuffthingmaps_detectron2",
    "VOCdevkit/VOC2012/JPEGImages": "VOCdevkit/VOC2012/JPEGImages",
    "VOCdevkit/VOC2012/annotations_detectron2": "VOCdevkit/VOC2012/annotations_ovs/val",
    "VOCdevkit/VOC2012/annotations_detectron2_bg": "VOCdevkit/VOC2012/annotations_ovs_background/val",
    "VOCdevkit/VOC2010/JPEGImages": "VOC2010/JPEGImages",
    "VOCdevkit/VOC2010/annotations_detectron2/pc59_val": "VOC2010/annotations_detectron2_ovs/pc59_val",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Miniatures]:
    """All miniatures, prepared and registered in place of the usual datasets."""
    root = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        miniatures = Miniatures(root)
        prepare(root)
        if HAS_CITYSCAPES:
            miniatures.write_cityscapes()
            prepare_cityscapes(root, patch)
        for catalog in (DatasetCatalog, MetadataCatalog):
            patch.setattr(catalog, "data", {})
        for register in ("coco", "ade20k", "cityscapes", "cityscapes_panoptic"):
            getattr(builtin, f"register_all_{register}")(str(root))
        register_all(str(root))
        yield miniatures


@pytest.fixture(scope="module")
def catseg_root(data: Miniatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniatures in CAT-Seg's folders."""
    root = tmp_path_factory.mktemp("catseg")
    for theirs, ours in CATSEG_FOLDERS.items():
        shutil.copytree(data.root / ours, root / theirs)
    labels = root / "VOCdevkit" / "VOC2010" / "annotations_detectron2" / "pc459_val"
    labels.mkdir()
    for path in (data.root / "VOC2010" / "annotations_detectron2_ovs" / "pc459_val").iterdir():
        classes = read_image(str(path))
        Image.fromarray(np.where(classes == 65535, 459, classes).astype(np.uint16)).save(labels / path.name)
    return root


def prepare(root: Path) -> None:
    for arguments in (
        ["coco"],
        ["coco_stuff"],
        ["coco_stuff", "--version", "10k"],
        ["ade20k"],
        ["ade20k_full"],
        ["voc"],
        ["pascal_context", "--splits", "train", "val"],
    ):
        load_script(f"prepare_{arguments[0]}").main([*arguments[1:], "--workers", "1"])
    sizes = ["--min-size", str(WORLD.min_size), "--max-size", str(WORLD.max_size)]
    load_script("prepare_ovshapes").main(["--train", "2", "--val", "2", *sizes, "--workers", "1"])
    assert not list(root.rglob("*.tmp")) and not list(root.rglob("*.partial"))


def prepare_cityscapes(root: Path, patch: pytest.MonkeyPatch) -> None:
    from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

    patch.setattr(sys, "stdout", open(os.devnull, "w"))
    folder = str(root / "cityscapes" / "gtFine")
    convert2panoptic(cityscapesPath=folder, setNames=["train", "val"])


def truth_of(data: Miniatures, file_name: str) -> Truth:
    path = Path(file_name)
    keys = [path.stem, f"{path.parent.name}/{path.stem}", f"{path.parent.parent.name}/{path.stem}"]
    return next(data.truths[key] for key in keys if key in data.truths)


def class_of(name: str, vocabulary: Vocabulary) -> int | None:
    known = [other for other in [name, *OTHER_NAMES.get(name, [])] if other in vocabulary.names]
    return vocabulary.names.index(known[0]) if known else None


def prediction(truth: Truth, vocabulary: Vocabulary, class_ids: dict[str, int]) -> dict:
    """A model's output that says of every segment what it is; nothing of names that the dataset lacks."""
    height, width = truth.segments.shape
    found = [(i + 1, class_ids[name]) for i, name in enumerate(truth.names) if name in class_ids]
    classes = np.zeros((height, width), np.int64)
    panoptic, instances = np.zeros((height, width), np.int32), Instances((height, width))
    for segment, class_id in found:
        classes[truth.segments == segment] = class_id
        panoptic[truth.segments == segment] = segment
    things = [(segment, class_id) for segment, class_id in found if vocabulary.is_thing[class_id]]
    instances.pred_masks = torch.from_numpy(
        np.stack([truth.segments == s for s, _ in things]) if things else np.zeros((0, height, width), bool)
    )
    instances.pred_classes = torch.tensor([class_id for _, class_id in things], dtype=torch.int64)
    instances.scores = torch.ones(len(things))
    segments = [{"id": s, "category_id": c, "isthing": vocabulary.is_thing[c]} for s, c in found]
    scores = torch.nn.functional.one_hot(torch.from_numpy(classes), len(vocabulary)).permute(2, 0, 1).float()
    return {"sem_seg": scores, "panoptic_seg": (torch.from_numpy(panoptic), segments), "instances": instances}


@pytest.mark.parametrize("name", NAMES)
def test_from_the_download_to_the_scores(data: Miniatures, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "cityscapes" in name and not HAS_CITYSCAPES:
        pytest.skip("needs cityscapesScripts")
    check_from_files_to_scores(data, name, capsys)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("coco_2017_train_stuff_all_sem_seg", "coco-stuff/annotations_detectron2/train2017"),
        ("coco_2017_test_stuff_base_sem_seg", "coco-stuff/annotations_detectron2/val2017"),
        ("voc_2012_test_sem_seg", "VOCdevkit/VOC2012/annotations_detectron2"),
        ("voc_2012_test_background_sem_seg", "VOCdevkit/VOC2012/annotations_detectron2_bg"),
        ("voc_21_sem_seg_val", "VOCdevkit/VOC2012/annotations_detectron2_bg"),
        ("context_59_test_sem_seg", "VOCdevkit/VOC2010/annotations_detectron2/pc59_val"),
        ("context_459_test_sem_seg", "VOCdevkit/VOC2010/annotations_detectron2/pc459_val"),
    ],
)
def test_folders_of_catseg(
    data: Miniatures,
    catseg_root: Path,
    name: str,
    labels: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", {})
    register_labelled_images(str(catseg_root))
    assert MetadataCatalog.get(name).sem_seg_root == str(catseg_root / labels)
    check_from_files_to_scores(data, name, capsys)


def check_from_files_to_scores(data: Miniatures, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check([name, "--partial", "--workers", "1"]) == 0, capsys.readouterr().out

    metadata = MetadataCatalog.get(name)
    vocabulary = vocabulary_from_metadata(metadata)
    tasks = [task for task in EVALUATORS[metadata.evaluator_type] if task != "mask_accuracy"]
    targets = next(value for key, value in TARGETS.items() if key in metadata.evaluator_type)
    settings = ["INPUT.TARGETS", targets, "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 65535, "MODEL.OVSEG.TEST.TASKS", tasks]
    cfg = data_cfg(name, *settings)
    records = load_dataset_dicts(name, filter_empty=False)
    truths = [truth_of(data, record["file_name"]) for record in records]
    assert len(records) == 2

    train = OVSegDatasetMapper(cfg, is_train=True, dataset_names=name)
    class_ids = {n: class_of(n, vocabulary) for truth in truths for n in truth.names}
    class_ids = {n: class_id for n, class_id in class_ids.items() if class_id is not None}
    for record, truth in zip(records, truths, strict=True):
        shown = {class_ids[n] for n in truth.names if n in class_ids}
        if targets == "instance":
            shown = {class_id for class_id in shown if vocabulary.is_thing[class_id]}
        if "background_label" in metadata.as_dict():
            shown = {class_id for class_id in shown if class_id < metadata.background_label}
        found = train(record)["instances"]
        assert set(found.gt_classes.tolist()) == shown
        assert found.gt_masks.tensor.any(dim=(1, 2)).all()

    test = OVSegDatasetMapper(cfg, is_train=False, dataset_names=name)
    inputs = [test(record) for record in records]

    def scores(classes: dict[str, int]) -> dict[str, float]:
        evaluator = build_evaluator(cfg, name)
        evaluator.reset()
        evaluator.process(inputs, [prediction(truth, vocabulary, classes) for truth in truths])
        results = evaluator.evaluate()
        return {f"{task}.{k}": v for task, values in results.items() for k, v in values.items() if k in HEADLINES[task]}

    perfect = scores(class_ids)
    assert len(perfect) == len(tasks) and all(value == pytest.approx(100) for value in perfect.values()), perfect
    # One of the classes under another's name: a thing where there is one, as all tasks score those.
    renamed = min(class_ids, key=lambda n: (not vocabulary.is_thing[class_ids[n]], n == "background"))
    kind = vocabulary.is_thing[class_ids[renamed]]
    other = next(i for i, flag in enumerate(vocabulary.is_thing) if flag == kind and i != class_ids[renamed])
    wrong = scores(class_ids | {renamed: other})
    assert all(value < 99 for value in wrong.values()), wrong


def test_every_dataset_is_tested(data: Miniatures) -> None:
    tested = {name.removesuffix("_seen") for name in NAMES}
    assert {name for name in project_datasets() if not name.startswith("ovshapes_train")} <= tested
