"""Evaluation: semantic, panoptic, instance and mask-classification metrics of detectron2 models."""

from ovseg_d2.evaluation.build import build_evaluator, scored_tasks
from ovseg_d2.evaluation.instance import InstanceEvaluator
from ovseg_d2.evaluation.mask_accuracy import MaskAccuracyEvaluator
from ovseg_d2.evaluation.oracle import OracleEvaluator
from ovseg_d2.evaluation.panoptic import PanopticEvaluator
from ovseg_d2.evaluation.panoptic_quality import PanopticQuality, panoptic_quality_from_files
from ovseg_d2.evaluation.results import results_table, write_json, write_results
from ovseg_d2.evaluation.sem_seg import SemSegEvaluator, sem_seg_scores

__all__ = [
    "InstanceEvaluator",
    "MaskAccuracyEvaluator",
    "OracleEvaluator",
    "PanopticEvaluator",
    "PanopticQuality",
    "SemSegEvaluator",
    "build_evaluator",
    "panoptic_quality_from_files",
    "results_table",
    "scored_tasks",
    "sem_seg_scores",
    "write_json",
    "write_results",
]
