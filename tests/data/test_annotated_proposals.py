"""The masks of annotations that the mapper adds in evaluation for GroundTruthProposals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ovseg_d2.data import OVSegDatasetMapper
from ovseg_d2.data.check import check_dataset, load_dataset_dicts
from tests.data.coded_data import CROWD_CLASS, IGNORE, CodedData, data_cfg, read_classes

ON_ANNOTATION = ("MODEL.OVSEG.PROPOSALS.NAME", "GroundTruthProposals")


def mapped(name: str, *overrides: Any, is_train: bool = False) -> Iterator[dict[str, Any]]:
    mapper = OVSegDatasetMapper(data_cfg(name, *ON_ANNOTATION, *overrides), is_train=is_train)
    return map(mapper, load_dataset_dicts(name, filter_empty=False))


@pytest.mark.parametrize("size", [0, 73])
@pytest.mark.parametrize("kind", ["panoptic", "semantic", "instance"])
def test_masks_are_transformed_like_the_image(coded: CodedData, kind: str, size: int) -> None:
    for record in mapped(f"coded_{kind}", "INPUT.MIN_SIZE_TEST", size):
        masks, class_ids = record["proposals"], record["proposal_classes"]
        assert masks.dtype == torch.bool and masks.shape[1:] == record["image"].shape[1:]
        assert class_ids.dtype == torch.int64
        # Crowds are no masks; a semantic file has none.
        assert class_ids.tolist() == [k for k in range(4) if k != CROWD_CLASS or kind == "semantic"]
        assert "instances" not in record and "sem_seg" not in record
        shown = read_classes(record["image"])
        for mask, class_id in zip(masks.numpy(), class_ids.tolist(), strict=True):
            # Polygons are filled to the nearest pixel, labels are resized exactly.
            different = (mask != (shown == class_id)).sum()
            assert different <= (0 if kind != "instance" else mask.shape[0] + mask.shape[1])


@pytest.mark.parametrize("kind", ["panoptic", "semantic"])
def test_what_a_resize_removes_keeps_an_empty_mask(coded: CodedData, kind: str) -> None:
    whole, tiny = next(mapped(f"coded_{kind}")), next(mapped(f"coded_{kind}", "INPUT.MIN_SIZE_TEST", 1))
    assert tiny["proposals"].shape[1] == 1
    assert tiny["proposal_classes"].equal(whole["proposal_classes"])
    assert not tiny["proposals"].flatten(1).any(1).all()


def test_classes_that_are_absent_are_no_masks(coded: CodedData) -> None:
    path = coded.root / "semantic" / "picture0.png"
    labels = np.array(Image.open(path))
    Image.fromarray(np.where(labels == 2, IGNORE, labels).astype(np.uint8)).save(path)
    assert next(mapped("coded_semantic"))["proposal_classes"].tolist() == [0, 1, 3]
    Image.fromarray(np.full_like(labels, IGNORE)).save(path)
    nothing = next(mapped("coded_semantic"))
    assert nothing["proposals"].shape == (0, *nothing["image"].shape[1:]) and len(nothing["proposal_classes"]) == 0


def test_only_where_they_are_wanted(coded: CodedData) -> None:
    for record in mapped("coded_panoptic", is_train=True):
        assert "proposals" not in record and "proposal_classes" not in record and "instances" in record
    other = OVSegDatasetMapper(data_cfg("coded_panoptic"), is_train=False)
    assert "proposals" not in other(load_dataset_dicts("coded_panoptic", filter_empty=False)[0])
    # They are not read from files; these do not exist.
    assert "proposals" in next(mapped("coded_panoptic", "MODEL.OVSEG.PROPOSALS.FILES", str(coded.root / "none")))


def test_their_files_are_looked_for_before_a_run(coded: CodedData) -> None:
    cfg = data_cfg("coded_panoptic", "MODEL.OVSEG.TEST.TASKS", ["mask_accuracy"])
    cfg.DATASETS.TRAIN = ()
    (coded.root / "panoptic" / "picture1.png").unlink()
    check_dataset(cfg, "coded_panoptic")  # of masks from elsewhere
    cfg.merge_from_list(list(ON_ANNOTATION))
    with pytest.raises(FileNotFoundError, match="panoptic/picture1.png does not exist"):
        check_dataset(cfg, "coded_panoptic")


def test_a_broken_annotation_is_named(coded: CodedData) -> None:
    (coded.root / "panoptic" / "picture1.png").unlink()
    with pytest.raises(FileNotFoundError, match="panoptic/picture1.png does not exist"):
        list(mapped("coded_panoptic"))
