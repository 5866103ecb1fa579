"""Checks of datasets: before a run, and whole on disk (``python -m ovseg_d2.data.check NAME``)."""

from ovseg_d2.data.check.before_run import (
    check_dataset,
    has_closed_vocabulary,
    load_dataset_dicts,
    require_registered,
)

__all__ = ["check_dataset", "has_closed_vocabulary", "load_dataset_dicts", "require_registered"]
