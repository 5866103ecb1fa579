"""Fixtures of the data tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.data.coded_data import CodedData
from tests.data.miniatures import load_script


@pytest.fixture
def coded(tmp_path: Path) -> Iterator[CodedData]:
    """The coded pictures, registered as ``coded_{panoptic,semantic,instance}`` for one test."""
    data = CodedData(tmp_path / "coded", "coded")
    data.register()
    yield data
    data.unregister()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all datasets, empty."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Augmentations draw from numpy's global generator."""
    np.random.seed(0)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script of ``datasets/`` by its name."""

    def load(name: str) -> ModuleType:
        module = load_script(name)
        monkeypatch.setitem(sys.modules, name, module)  # worker processes look functions up by module name
        return module

    return load
