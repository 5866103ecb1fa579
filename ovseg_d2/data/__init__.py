"""Datasets, vocabularies, the mapper and the loaders. Importing this package registers the datasets."""

from ovseg_d2.data import datasets  # registers
from ovseg_d2.data.build import build_test_loader, build_train_loader
from ovseg_d2.data.check import check_dataset
from ovseg_d2.data.dataset_mapper import OVSegDatasetMapper
from ovseg_d2.data.vocabulary import vocabulary_from_metadata

__all__ = [
    "OVSegDatasetMapper",
    "build_test_loader",
    "build_train_loader",
    "check_dataset",
    "datasets",
    "vocabulary_from_metadata",
]
