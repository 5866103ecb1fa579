"""Vocabularies from metadata."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from detectron2.data import MetadataCatalog

import ovseg_d2.data  # noqa: F401  registers the datasets
from ovseg_d2.data import vocabulary_from_metadata


@pytest.mark.parametrize(
    ("name", "num_classes", "num_things"),
    [
        ("coco_2017_val_panoptic_with_sem_seg", 133, 80),
        ("coco_2017_val", 80, 80),
        ("ade20k_panoptic_val", 150, 100),
        ("ade20k_instance_val", 100, 100),
        ("ade20k_sem_seg_val", 150, 0),
        ("cityscapes_fine_panoptic_val", 19, 8),
        ("ovshapes_val", 72, 64),
        ("ovshapes_train_seen", 54, 48),
        ("ovshapes_train_seen_instance", 48, 48),
        ("ovshapes_val_sem_seg", 72, 0),
    ],
)
def test_registered_data_sets(name: str, num_classes: int, num_things: int) -> None:
    vocabulary = vocabulary_from_metadata(MetadataCatalog.get(name))
    assert len(vocabulary) == num_classes and sum(vocabulary.is_thing) == num_things
    assert all(name == name.strip() for name in vocabulary.names)


def test_things_are_where_their_ids_say() -> None:
    metadata = SimpleNamespace(
        stuff_classes=["sky", "cat ", "road", "dog"],
        thing_classes=["cat ", "dog"],
        thing_dataset_id_to_contiguous_id={17: 1, 18: 3},
    )
    vocabulary = vocabulary_from_metadata(metadata)
    assert vocabulary.names == ("sky", "cat", "road", "dog")
    assert vocabulary.is_thing == (False, True, False, True)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (SimpleNamespace(name="empty"), "'empty' is registered without stuff_classes or thing_classes"),
        (MetadataCatalog.get("coco_2017_val_panoptic_separated"), "numbers things and stuffs separately"),
    ],
)
def test_unusable_metadata(metadata: SimpleNamespace, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocabulary_from_metadata(metadata)
