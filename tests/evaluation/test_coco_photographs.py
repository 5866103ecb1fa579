"""Two photographs with real COCO panoptic annotations: ground truth as prediction scores 100 in every evaluator."""

import json
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog

from ovseg_d2.evaluation import InstanceEvaluator, PanopticEvaluator, SemSegEvaluator
from ovseg_d2.evaluation.panoptic_png import read_panoptic_png
from ovseg_d2.evaluation.sem_seg import load_semantic_ground_truth
from tests.evaluation.panoptic_files import instances_output, panoptic_output, sem_seg_output

SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_panoptic_sample"
pytestmark = pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs the COCO panoptic sample")


@pytest.fixture(scope="module")
def photographs():
    """Dataset name and dataset dicts with contiguous classes."""
    categories = json.loads((SAMPLE / "panoptic_coco_categories.json").read_text())
    contiguous = {c["id"]: k for k, c in enumerate(categories)}
    things = {c["id"]: contiguous[c["id"]] for c in categories if c["isthing"]}
    tables = json.loads((SAMPLE / "panoptic_examples.json").read_text())
    name = f"photographs_{uuid.uuid4().hex}"
    MetadataCatalog.get(name).set(
        panoptic_json=str(SAMPLE / "panoptic_examples.json"),
        panoptic_root=str(SAMPLE / "panoptic_examples"),
        stuff_classes=[c["name"] for c in categories],
        thing_classes=[c["name"] for c in categories if c["isthing"]],
        stuff_dataset_id_to_contiguous_id=contiguous,
        thing_dataset_id_to_contiguous_id=things,
        ignore_label=255,
    )
    inputs = [
        {
            "image_id": a["image_id"],
            "file_name": a["file_name"],
            "pan_seg_file_name": str(SAMPLE / "panoptic_examples" / a["file_name"]),
            "segments_info": [s | {"category_id": contiguous[s["category_id"]]} for s in a["segments_info"]],
        }
        for a in tables["annotations"]
    ]
    return name, inputs, set(things.values())


def test_panoptic(photographs):
    name, inputs, things = photographs
    evaluator = PanopticEvaluator(dataset_name=name)
    for image in inputs:
        ids = read_panoptic_png(image["pan_seg_file_name"])
        classes = {s["id"]: s["category_id"] for s in image["segments_info"] if not s["iscrowd"]}
        evaluator.process([image], [panoptic_output(np.where(np.isin(ids, list(classes)), ids, 0), classes, things)])
    scores = evaluator.evaluate()["panoptic_seg"]
    assert (scores["PQ"], scores["PQ_th"], scores["PQ_st"]) == (100, 100, 100)


def test_semantic(photographs):
    name, inputs, _ = photographs
    evaluator = SemSegEvaluator(dataset_name=name)
    for image in inputs:
        labels, _ = load_semantic_ground_truth(image, ignore_label=255)
        assert len(np.unique(labels)) > 4
        evaluator.process([image], [sem_seg_output(np.where(labels == 255, 0, labels), num_classes=133)])
    scores = evaluator.evaluate()["sem_seg"]
    assert scores["mIoU"] == scores["pACC"] == pytest.approx(100)


def test_instance(photographs):
    name, inputs, things = photographs
    evaluator = InstanceEvaluator(dataset_name=name)
    for image in inputs:
        ids = read_panoptic_png(image["pan_seg_file_name"])
        objects = [s for s in image["segments_info"] if s["category_id"] in things and not s["iscrowd"]]
        masks, classes = [ids == s["id"] for s in objects], [s["category_id"] for s in objects]
        scores = torch.linspace(0.9, 0.5, len(objects)).tolist()
        evaluator.process([image], [instances_output(masks, scores, classes, ids.shape)])
    results = evaluator.evaluate()
    assert results["segm"]["AP"] == results["bbox"]["AP"] == pytest.approx(100)
