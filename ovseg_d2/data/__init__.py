"""Data sets, vocabularies, the mapper and the loaders. Importing this package registers the data sets."""

from . import datasets  # registers
from .build import build_test_loader, build_train_loader
from .check import check_dataset
from .dataset_mapper import OVSegDatasetMapper
from .vocabulary import vocabulary_from_metadata

__all__ = [
    "OVSegDatasetMapper",
    "build_test_loader",
    "build_train_loader",
    "check_dataset",
    "datasets",
    "vocabulary_from_metadata",
]
