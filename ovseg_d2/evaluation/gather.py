"""Per-image records of all processes, merged: an image that two processes saw (padded samplers) counts once."""

import logging
from collections.abc import Collection, Hashable
from typing import TypeVar

from detectron2.utils import comm

logger = logging.getLogger(__name__)
Record = TypeVar("Record")


def gather_records(records: dict[Hashable, Record]) -> dict[Hashable, Record] | None:
    """The records of all processes by image on the main process, None on the others."""
    comm.synchronize()
    gathered = comm.gather(records, dst=0)
    if not comm.is_main_process():
        return None
    merged: dict[Hashable, Record] = {}
    for part in gathered:
        merged.update(part)
    return merged


def check_complete(
    evaluated: Collection[Hashable], annotated: Collection[Hashable], *, source: str, allow_missing: bool
) -> None:
    """Refuses to score a part of the dataset as if it were the whole.

    Raises:
        ValueError: annotated images have no prediction; with ``allow_missing`` their number is logged instead.
    """
    missing = [image_id for image_id in annotated if image_id not in evaluated]
    if not missing:
        return
    message = f"{len(missing)} of {len(annotated)} images of {source} have no prediction, the first is {missing[0]!r}"
    if not allow_missing:
        raise ValueError(f"{message}; TEST.ON_CORRUPT_IMAGE 'skip' would leave them out")
    logger.warning("%s; they are left out", message)


def required_output(output: dict, key: str, evaluator: str) -> object:
    """``output[key]``, or a message that says which task to switch on.

    Raises:
        ValueError: the model did not produce this kind of result.
    """
    if key not in output:
        raise ValueError(f"{evaluator} needs model output {key!r}, found {sorted(output)}: see MODEL.OVSEG.TEST.TASKS")
    return output[key]
