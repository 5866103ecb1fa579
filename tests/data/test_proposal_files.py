"""Files of mask proposals: what is written is read, an interrupted file goes on, masks follow the augmentations."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T

from ovseg_d2.config import add_ovseg_config
from ovseg_d2.data.augmentation import transform_masks
from ovseg_d2.data.check import load_dataset_dicts
from ovseg_d2.data.dataset_mapper import DatasetInfo, OVSegDatasetMapper
from ovseg_d2.data.image_io import read_image
from ovseg_d2.data.proposal_files import ProposalReader, ProposalWriter, proposal_path


def random_masks(num: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((num, *size)) < 0.3


def test_written_masks_are_read(tmp_path):
    images = {7: random_masks(5, (9, 13)), 'a "name"': random_masks(0, (4, 6)), "b": np.zeros((1, 3, 3), bool)}
    with ProposalWriter(tmp_path / "new" / "x.jsonl", {"fingerprint": "f"}) as writer:
        for image_id, masks in images.items():
            writer.add(image_id=image_id, file_name="x.png", masks=masks, scores=[0.5] * len(masks))
    reader = ProposalReader(tmp_path / "new" / "x.jsonl")
    assert reader.image_ids == list(images) and reader.header["fingerprint"] == "f"
    for image_id, masks in images.items():
        found = reader.masks(image_id, masks.shape[1:])
        assert found.shape == masks.shape and (found == masks).all()


def test_an_interrupted_file_goes_on(tmp_path):
    path = tmp_path / "x.jsonl"
    with ProposalWriter(path, {"fingerprint": "f"}) as writer:
        for i in range(3):
            writer.add(image_id=i, file_name="x.png", masks=random_masks(4, (8, 8), seed=i))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # killed while the last image was written
    with ProposalWriter(path, {"fingerprint": "f"}) as writer:
        assert writer.done == {0, 1}
        writer.add(image_id=2, file_name="x.png", masks=random_masks(4, (8, 8), seed=2))
    assert path.read_bytes() == whole
    with pytest.raises(ValueError, match="x.jsonl holds proposals of fingerprint 'f', not 'g'"):
        ProposalWriter(path, {"fingerprint": "g"})


def test_bad_files(tmp_path):
    path = tmp_path / "x.jsonl"
    with pytest.raises(FileNotFoundError, match="x.jsonl do not exist; tools/export_proposals.py"):
        ProposalReader(path)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="x.jsonl is not a file of mask proposals"):
        ProposalReader(path)
    with ProposalWriter(tmp_path / "y.jsonl", {}) as writer:
        writer.add(image_id=1, file_name="x.png", masks=random_masks(1, (8, 9)))
    reader = ProposalReader(tmp_path / "y.jsonl")
    with pytest.raises(ValueError, match=r"photo.jpg \(image_id 2\) has no mask proposals in .*y.jsonl"):
        reader.masks(2, (8, 9), name="photo.jpg")
    with pytest.raises(ValueError, match=r"photo.jpg is 9 x 8, but .*y.jsonl has masks of \[8, 9\]"):
        reader.masks(1, (9, 8), name="photo.jpg")
    with open(tmp_path / "y.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "x"}) + "\n")
    with pytest.raises(ValueError, match="y.jsonl, line 3: no image_id"):
        ProposalReader(tmp_path / "y.jsonl")


@pytest.mark.parametrize("num", [0, 1, 23, 24, 50])
def test_masks_follow_transforms_one_by_one(num):
    masks = random_masks(num, (20, 30))
    transforms = T.TransformList(
        [T.ResizeTransform(20, 30, 33, 41), T.HFlipTransform(41), T.CropTransform(5, 3, 30, 25)]
    )
    moved = transform_masks(masks, transforms)
    assert moved.shape == (num, 25, 30) and moved.dtype == bool
    for mask, expected in zip(masks, moved, strict=True):
        assert (transforms.apply_segmentation(mask.astype(np.uint8)) == expected).all()


@pytest.mark.parametrize("is_train", [False, True])
def test_mapper_augments_masks_with_the_image(coded, tmp_path, is_train):
    """The masks are the image's own colours, so that they must agree wherever the image goes."""
    name = "coded_panoptic"
    records = load_dataset_dicts(name, filter_empty=False)
    path = tmp_path / f"{name}.jsonl"
    with ProposalWriter(path, {"dataset": name}) as writer:
        for record in records:
            image = read_image(record["file_name"], "RGB")
            masks = np.stack([image[..., channel] > 100 for channel in range(3)])
            writer.add(image_id=record["image_id"], file_name=record["file_name"], masks=masks)
    mapper = OVSegDatasetMapper(
        is_train=is_train,
        augmentations=[T.RandomFlip(prob=1.0), T.RandomCrop("absolute", (12, 17))],
        image_format="RGB",
        targets="panoptic",
        ignore_value=255,
        keep_empty_masks=True,
        datasets={name: DatasetInfo.from_name(name)},
        on_corrupt_image="raise",
        proposals={name: ProposalReader(path)},
    )
    for record in records:
        x = mapper(record)
        assert torch.equal(x["proposals"], x["image"] > 100)
        assert x["proposals"].shape[1:] == x["image"].shape[1:]
    with pytest.raises(ValueError, match="has no mask proposals in"):
        mapper({**records[0], "image_id": "another"})


def test_files_of_the_config(coded, tmp_path):
    name = "coded_panoptic"
    cfg = get_cfg()
    add_ovseg_config(cfg)
    cfg.MODEL.OVSEG.PROPOSALS.FILES = str(tmp_path)
    with pytest.raises(FileNotFoundError, match="coded_panoptic.jsonl do not exist"):
        OVSegDatasetMapper(cfg, is_train=False, dataset_names=name)
    record = load_dataset_dicts(name, filter_empty=False)[0]
    size = read_image(record["file_name"], "RGB").shape[:2]
    with ProposalWriter(proposal_path(tmp_path, name), {"dataset": name}) as writer:
        writer.add(image_id=record["image_id"], file_name=record["file_name"], masks=random_masks(2, size))
    x = OVSegDatasetMapper(cfg, is_train=False, dataset_names=name)(record)
    assert x["proposals"].shape == (2, *x["image"].shape[1:])  # as the image is resized
    cfg.MODEL.OVSEG.PROPOSALS.FILES = ""
    assert "proposals" not in OVSegDatasetMapper(cfg, is_train=False, dataset_names=name)(record)
