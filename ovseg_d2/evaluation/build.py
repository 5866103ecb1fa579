"""Chooses evaluators by the dataset's ``evaluator_type`` and the tasks that are switched on."""

from collections.abc import Callable
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from ovseg_d2.data.vocabulary import training_vocabulary
from ovseg_d2.evaluation.cityscapes import CityscapesInstance, CityscapesSemantic
from ovseg_d2.evaluation.instance import InstanceEvaluator
from ovseg_d2.evaluation.mask_accuracy import MaskAccuracyEvaluator
from ovseg_d2.evaluation.oracle import OracleEvaluator
from ovseg_d2.evaluation.panoptic import PanopticEvaluator
from ovseg_d2.evaluation.sem_seg import SemSegEvaluator

# evaluator_type -> tasks that its annotations can score, each with the kind of evaluator.
_MASKS = {"mask_accuracy": "mask_accuracy"}
_PANOPTIC_LAYOUT = {"semantic": "sem_seg", "panoptic": "panoptic", "instance": "instance", **_MASKS}
EVALUATORS: dict[str, dict[str, str]] = {
    "sem_seg": {"semantic": "sem_seg", **_MASKS},
    "coco": {"instance": "instance", **_MASKS},
    "coco_panoptic_seg": _PANOPTIC_LAYOUT,
    "ade20k_panoptic_seg": _PANOPTIC_LAYOUT,
    "mapillary_vistas_panoptic_seg": _PANOPTIC_LAYOUT,
    "cityscapes_sem_seg": {"semantic": "cityscapes_sem_seg", **_MASKS},
    "cityscapes_instance": {"instance": "cityscapes_instance", **_MASKS},
    "cityscapes_panoptic_seg": {
        "semantic": "cityscapes_sem_seg",
        "panoptic": "panoptic",
        "instance": "cityscapes_instance",
        **_MASKS,
    },
}


def scored_tasks(cfg: CfgNode, dataset_name: str) -> list[str]:
    """The tasks in MODEL.OVSEG.TEST.TASKS that the annotations of a dataset can score.

    Raises:
        ValueError: the evaluator type is unknown, or there is no such task.
    """
    scorable, tasks = _scorable(dataset_name), list(cfg.MODEL.OVSEG.TEST.TASKS)
    if scorable.keys().isdisjoint(tasks):
        kind = MetadataCatalog.get(dataset_name).evaluator_type
        raise ValueError(
            f"MODEL.OVSEG.TEST.TASKS is {tasks}, dataset {dataset_name!r} ({kind}) can score {sorted(scorable)}"
        )
    return [task for task in tasks if task in scorable]


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | Path | None = None) -> DatasetEvaluator:
    """Evaluators of the tasks in MODEL.OVSEG.TEST.TASKS that the dataset can score, and of MODEL.OVSEG.TEST.ORACLE.

    Args:
        cfg: the config.
        dataset_name: a registered dataset; its metadata has ``evaluator_type``.
        output_folder: where predictions are written; None writes none.

    Raises:
        ValueError: the evaluator type is unknown, none of the tasks can be scored on the dataset, an upper bound is
            asked for without semantic results, or mask accuracy of other masks than those of the annotations.
        ImportError: a Cityscapes dataset without the official scripts.
    """
    scorable, tasks = _scorable(dataset_name), scored_tasks(cfg, dataset_name)
    generator = cfg.MODEL.OVSEG.PROPOSALS.NAME
    if "mask_accuracy" in tasks and generator != "GroundTruthProposals":
        raise ValueError(
            f"MODEL.OVSEG.TEST.TASKS has mask_accuracy, but MODEL.OVSEG.PROPOSALS.NAME is {generator!r}; expected "
            "GroundTruthProposals, whose masks have classes"
        )
    # Unless a dataset has a zero-shot split of its own, what training did not name is unseen.
    classes = {"dataset_name": dataset_name, "trained_vocabulary": training_vocabulary(cfg.DATASETS.TRAIN)}
    ignore_label = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    files = {"output_folder": output_folder, "allow_missing": cfg.TEST.ON_CORRUPT_IMAGE == "skip"}
    make: dict[str, Callable[[], DatasetEvaluator]] = {
        "sem_seg": lambda: SemSegEvaluator(**classes, ignore_label=ignore_label),
        "panoptic": lambda: PanopticEvaluator(dataset_name=dataset_name, **files),
        "instance": lambda: InstanceEvaluator(dataset_name=dataset_name, **files),
        "mask_accuracy": lambda: MaskAccuracyEvaluator(**classes),
        "cityscapes_sem_seg": lambda: CityscapesSemantic(dataset_name),
        "cityscapes_instance": lambda: CityscapesInstance(dataset_name),
    }
    evaluators = [make[scorable[task]]() for task in tasks]
    if cfg.MODEL.OVSEG.TEST.ORACLE:
        if "semantic" not in tasks:
            raise ValueError(
                f"MODEL.OVSEG.TEST.ORACLE is {cfg.MODEL.OVSEG.TEST.ORACLE!r}, which is of semantic results; "
                f"MODEL.OVSEG.TEST.TASKS is {list(cfg.MODEL.OVSEG.TEST.TASKS)}, and dataset {dataset_name!r} can score "
                f"{sorted(scorable)}"
            )
        evaluators.append(OracleEvaluator(**classes, ignore_label=ignore_label))
    return DatasetEvaluators(evaluators)


def _scorable(dataset_name: str) -> dict[str, str]:
    """The tasks that a dataset can score, each with the kind of evaluator."""
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if evaluator_type not in EVALUATORS:
        raise ValueError(
            f"dataset {dataset_name!r} has evaluator_type {evaluator_type!r}, known are {sorted(EVALUATORS)}"
        )
    return EVALUATORS[evaluator_type]
