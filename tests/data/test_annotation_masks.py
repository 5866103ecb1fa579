"""Masks of annotations as proposals: segments and connected regions, of panoptic, semantic and instance files."""

import numpy as np
import pytest
from PIL import Image

from ovseg_d2.data.annotation_masks import annotation_masks, connected_regions
from ovseg_d2.data.dataset_mapper import DatasetInfo
from tests.evaluation.panoptic_files import CAT, DOG, GRASS, make_dataset, painted

IDS = painted("1133 1030 2241")  # 1: two parts, the second touches nothing of the first


@pytest.fixture
def record(tmp_path):
    dataset = make_dataset(tmp_path, [(IDS, {1: CAT, 2: GRASS, 3: DOG})], crowd={3})
    return dataset.inputs[0] | {"dataset_name": dataset.name}


def info(record) -> DatasetInfo:
    return DatasetInfo(num_classes=3, ignore_label=255)


def texts(masks: np.ndarray) -> set[str]:
    return {" ".join("".join(str(int(v)) for v in row) for row in mask) for mask in masks}


def test_segments_are_the_targets_of_training(record):
    found = annotation_masks(record, info(record), "segments")
    assert found.dtype == bool
    # Not the crowd 3, not 4, which no segment has.
    assert texts(found) == {"1100 1000 0001", "0000 0000 1100"}


def test_regions_are_all_that_is_labelled(record):
    found = annotation_masks(record, info(record), "regions")
    assert texts(found) == {
        "1100 1000 0000",
        "0000 0000 0001",
        "0000 0000 1100",
        "0011 0010 0000",
        "0000 0000 0010",
    }


def test_corners_connect():
    assert len(connected_regions(painted("10 01"), unlabelled=0)) == 1
    assert len(connected_regions(painted("101"), unlabelled=0)) == 2
    assert len(connected_regions(painted("101"), unlabelled=None)) == 3
    assert connected_regions(np.zeros((2, 3), int), unlabelled=0).shape == (0, 2, 3)


def test_semantic_files(record, tmp_path):
    """A zero-shot view, whose table lacks label 1: no segment of it, but its regions."""
    path = tmp_path / "labels.png"
    Image.fromarray(np.array([[0, 0, 1, 0], [2, 2, 255, 1], [2, 2, 255, 1]], np.uint8)).save(path)
    record = {k: v for k, v in record.items() if k not in ("pan_seg_file_name", "segments_info")}
    record["sem_seg_file_name"] = str(path)
    view = DatasetInfo(num_classes=2, ignore_label=255, class_of_label=np.array([0, -1, 1]))
    assert texts(annotation_masks(record, view, "segments")) == {"1101 0000 0000", "0000 1100 1100"}
    assert texts(annotation_masks(record, view, "regions")) == {
        "1100 0000 0000",
        "0001 0000 0000",
        "0010 0001 0001",
        "0000 1100 1100",
    }


def test_instances_have_segments_only(record):
    record = {k: v for k, v in record.items() if k not in ("pan_seg_file_name", "segments_info")}
    square = [[0, 0, 2, 0, 2, 2, 0, 2]]
    record["annotations"] = [{"category_id": 0, "segmentation": square}]
    assert texts(annotation_masks(record, info(record), "segments")) == {"1100 1100 0000"}
    assert annotation_masks(record | {"annotations": []}, info(record), "segments").shape == (0, 3, 4)
    with pytest.raises(ValueError, match="no pan_seg_file_name and no sem_seg_file_name, which regions are made"):
        annotation_masks(record, info(record), "regions")


def test_bad_input(record):
    with pytest.raises(ValueError, match="got 'region'; allowed are segments, regions"):
        annotation_masks(record, info(record), "region")
    with pytest.raises(ValueError, match="no pan_seg_file_name and no sem_seg_file_name and no annotations, which seg"):
        annotation_masks({"file_name": "a.jpg", "dataset_name": "x"}, info(record), "segments")
