"""detectron2's Cityscapes evaluators, which call the official scripts (extra ``cityscapes``)."""

import contextlib
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
from detectron2.evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator


class _OfficialScripts:
    """Checks that the scripts are there, and lets them run on a current numpy."""

    def __init__(self, dataset_name: str) -> None:
        if find_spec("cityscapesscripts") is None:
            raise ImportError(
                f"evaluating {dataset_name!r} needs cityscapesScripts: pip install 'ovseg_d2[cityscapes]'"
            )
        super().__init__(dataset_name)

    def evaluate(self) -> dict | None:
        """Scores on the main process, None on the others."""
        with _numpy_in1d():
            return super().evaluate()


class CityscapesSemantic(_OfficialScripts, CityscapesSemSegEvaluator):
    """Official Cityscapes IoU and iIoU of classes and groups."""


class CityscapesInstance(_OfficialScripts, CityscapesInstanceEvaluator):
    """Official Cityscapes AP and AP50."""

    def evaluate(self) -> dict | None:
        with _no_json():
            return super().evaluate()


@contextlib.contextmanager
def _no_json() -> Iterator[None]:
    """The script leaves a matches.json in the current folder, and fails to write the integers of a current numpy."""
    from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as script

    write = script.writeDict2JSON
    script.writeDict2JSON = lambda content, path: None
    try:
        yield
    finally:
        script.writeDict2JSON = write


@contextlib.contextmanager
def _numpy_in1d() -> Iterator[None]:
    """cityscapesScripts calls np.in1d, which numpy 2.4 removed in favour of np.isin."""
    if hasattr(np, "in1d"):
        yield
        return
    np.in1d = np.isin
    try:
        yield
    finally:
        del np.in1d
