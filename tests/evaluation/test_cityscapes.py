"""The official Cityscapes scripts on generated street scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.cityscapes import load_cityscapes_semantic
from detectron2.structures import Instances

from ovseg_d2.data import build_test_loader
from ovseg_d2.data.check import check_dataset
from ovseg_d2.data.image_io import read_image
from ovseg_d2.evaluation import build_evaluator
from ovseg_d2.evaluation.sem_seg import SemSegEvaluator
from tests.helpers import tiny_cfg

pytest.importorskip("cityscapesscripts", reason="needs cityscapesScripts: pip install 'ovseg_d2[cityscapes]'")

from tests.evaluation.cityscapes_files import CITIES, SIZE, THINGS, write_cityscapes  # noqa: E402

NUM_CLASSES = 19
KEYS = ("evaluator_type", "ignore_label", "thing_classes", "stuff_classes")


@pytest.fixture
def dataset(tmp_path, request):
    """Registered as detectron2 registers ``cityscapes_fine_sem_seg_val``, or another one of the same files."""
    write_cityscapes(tmp_path)
    image_dir, gt_dir = str(tmp_path / "leftImg8bit" / "val"), str(tmp_path / "gtFine" / "val")
    name = f"{request.node.name}_dataset"
    original = MetadataCatalog.get(getattr(request, "param", "cityscapes_fine_sem_seg_val"))
    DatasetCatalog.register(name, lambda: load_cityscapes_semantic(image_dir, gt_dir))
    MetadataCatalog.get(name).set(
        image_dir=image_dir,
        gt_dir=gt_dir,
        **{key: original.get(key) for key in KEYS if original.get(key, None) is not None},
    )
    yield MetadataCatalog.get(name)
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def cityscapes_cfg(name: str, task: str = "semantic"):
    cfg = tiny_cfg(num_classes=NUM_CLASSES, tasks=[task])
    cfg.DATASETS.TEST = (name,)
    cfg.INPUT.TARGETS = "semantic"
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 24, 48
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def train_ids(x: dict) -> torch.Tensor:
    return torch.from_numpy(read_image(x["sem_seg_file_name"]).astype(np.int64))


def scores_of(classes: torch.Tensor) -> torch.Tensor:
    """Classes (H, W) -> sem_seg (K, H, W)."""
    return torch.nn.functional.one_hot(classes.clamp(max=NUM_CLASSES - 1), NUM_CLASSES).permute(2, 0, 1).float()


def evaluated(evaluator, batches: list[list[dict]], predict) -> dict:
    evaluator.reset()
    for batch in batches:
        evaluator.process(batch, [predict(x) for x in batch])
    return evaluator.evaluate()


def test_data_and_perfect_predictions(dataset):
    cfg = cityscapes_cfg(dataset.name)
    check_dataset(cfg, dataset.name)
    batches = list(build_test_loader(cfg, dataset.name))
    assert len(batches) == len(CITIES)
    assert all((x["height"], x["width"]) == SIZE and x["image"].shape == (3, 24, 48) for (x,) in batches)
    found = evaluated(build_evaluator(cfg, dataset.name), batches, lambda x: {"sem_seg": scores_of(train_ids(x))})
    assert found["sem_seg"] == {"IoU": 100.0, "iIoU": 100.0, "IoU_sup": 100.0, "iIoU_sup": 100.0}


def test_wrong_predictions_score_as_with_our_own_metric(dataset):
    cfg = cityscapes_cfg(dataset.name)
    batches = list(build_test_loader(cfg, dataset.name))

    def shifted(x: dict) -> dict:
        classes = train_ids(x)
        classes[classes == 255] = 3
        return {"sem_seg": scores_of(classes.roll(5, dims=1))}

    official = evaluated(build_evaluator(cfg, dataset.name), batches, shifted)["sem_seg"]
    ours = evaluated(SemSegEvaluator(dataset_name=dataset.name), batches, shifted)["sem_seg"]
    # Both count a class that is only predicted, "wall", as 0.
    assert official["IoU"] == pytest.approx(ours["mIoU"]) and 10 < official["IoU"] < 90 and ours["IoU-wall"] == 0


@pytest.mark.parametrize("dataset", ["cityscapes_fine_instance_seg_val"], indirect=True)
def test_perfect_instances(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = cityscapes_cfg(dataset.name, "instance")
    batches = [[record] for record in DatasetCatalog.get(dataset.name)]

    def perfect(x: dict) -> dict:
        ids = read_image(x["sem_seg_file_name"].replace("labelTrainIds", "instanceIds")).astype(np.int64)
        found = [int(i) for i in np.unique(ids) if i >= 1000]
        instances = Instances(SIZE)
        instances.pred_masks = torch.from_numpy(np.stack([ids == i for i in found]))
        instances.pred_classes = torch.tensor([{24: 0, 26: 2}[i // 1000] for i in found])
        instances.scores = torch.linspace(0.9, 0.5, len(found))
        assert {i // 1000 for i in found} <= set(THINGS)
        return {"instances": instances}

    found = evaluated(build_evaluator(cfg, dataset.name), batches, perfect)
    assert found["segm"]["AP50"] == pytest.approx(100) and found["segm"]["AP"] == pytest.approx(100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gtFine", "leftImg8bit"]


def test_nothing_is_left_behind(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    Path(tmp_path, "temporary").mkdir()
    before = hasattr(np, "in1d")
    cfg = cityscapes_cfg(dataset.name)
    batches = list(build_test_loader(cfg, dataset.name))
    evaluated(build_evaluator(cfg, dataset.name), batches, lambda x: {"sem_seg": scores_of(train_ids(x))})
    assert list(Path(tmp_path, "temporary").iterdir()) == []
    assert hasattr(np, "in1d") == before
