"""Vocabularies from a dataset's metadata."""

from __future__ import annotations

from typing import Any

from ovseg_d2.structures import Vocabulary

# Datasets of instances alone: their classes are the things, whatever stuff_classes their metadata lists beside them.
_INSTANCE_EVALUATORS = ("coco", "lvis", "cityscapes_instance")


def vocabulary_from_metadata(metadata: Any) -> Vocabulary:
    """All K classes of a registered dataset, in the order of their contiguous ids.

    Panoptic datasets list all classes as ``stuff_classes`` and mark the things by
    ``thing_dataset_id_to_contiguous_id``; instance datasets have ``thing_classes`` only.

    Raises:
        ValueError: the metadata has no class names, or numbers things and stuffs separately (Panoptic-FPN style).
    """
    only_things = getattr(metadata, "evaluator_type", None) in _INSTANCE_EVALUATORS
    if hasattr(metadata, "stuff_classes") and not only_things:
        # Blanks around a name ("window " in detectron2's ADE20K table) would reach the text tower.
        names = tuple(name.strip() for name in metadata.stuff_classes)
        things = set(getattr(metadata, "thing_dataset_id_to_contiguous_id", {}).values())
        thing_names = {name.strip() for name in getattr(metadata, "thing_classes", names)}
        if any(i >= len(names) or names[i] not in thing_names for i in things):
            raise ValueError(
                f"dataset {metadata.name!r} numbers things and stuffs separately; expected one list of all classes "
                "in stuff_classes (for COCO: coco_2017_*_panoptic_with_sem_seg)"
            )
        return Vocabulary(names=names, is_thing=tuple(i in things for i in range(len(names))))
    if hasattr(metadata, "thing_classes"):
        names = tuple(name.strip() for name in metadata.thing_classes)
        return Vocabulary(names=names, is_thing=(True,) * len(names))
    raise ValueError(f"dataset {getattr(metadata, 'name', '?')!r} is registered without stuff_classes or thing_classes")
