"""Loaders for training and evaluation, on detectron2's samplers; every process of a distributed run has its own."""

from __future__ import annotations

import functools
import itertools
import logging
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetFromList
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import InferenceSampler, RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from ovseg_d2.data.check import load_dataset_dicts
from ovseg_d2.data.dataset_mapper import OVSegDatasetMapper

_logger = logging.getLogger(__name__)
Record = dict[str, Any]


class MappedDataset(Dataset):
    """Applies a mapper, and takes the next image for one that the mapper skips (so that all ranks keep in step).

    detectron2's own MapDataset draws the substitute from a set, which Python 3.11 no longer allows.

    A bad annotation or a missing file is returned as the exception itself: `_RaisingLoader` raises it in the main
    process in its own words, where PyTorch would raise a page of text about its worker.
    """

    def __init__(self, dataset: Dataset, mapper: Callable[[Record], Record | None], *, replace_skipped: bool) -> None:
        self.dataset = dataset
        self.mapper = mapper
        self.replace_skipped = replace_skipped

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Record | Exception | None:
        try:
            for offset in range(len(self)):
                record = self.mapper(self.dataset[(index + offset) % len(self)])
                if record is not None or not self.replace_skipped:
                    return record
            return ValueError(f"none of the {len(self)} training images can be decoded (DATASETS.TRAIN)")
        except (ValueError, FileNotFoundError) as error:
            return error


class _RaisingLoader:
    """Iterates a loader of single items or lists and raises the exceptions that are among them."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for items in self.loader:
            for item in items if isinstance(items, list) else [items]:
                if isinstance(item, Exception):
                    raise item
            yield items


class EvaluationLoader:
    """Batches of one image each; one that was skipped (``TEST.ON_CORRUPT_IMAGE skip``) gives no batch.

    Attributes:
        dataset_name: the dataset.
        mapper: its ``num_skipped`` is the number of images of this process's share that were left out.
    """

    def __init__(self, loader: _RaisingLoader, mapper: OVSegDatasetMapper, dataset_name: str) -> None:
        self.loader = loader
        self.mapper = mapper
        self.dataset_name = dataset_name

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def num_skipped(self) -> int:
        """Images of this process's share that the last iteration left out of the evaluation."""
        return self.mapper.num_skipped

    def __iter__(self) -> Iterator[list[Record]]:
        self.mapper.reset_num_skipped()
        for batch in self.loader:
            batch = [record for record in batch if record is not None]
            if batch:
                yield batch
        if self.num_skipped:
            _logger.warning(
                "%s: %d of %d images could not be decoded and are missing from the evaluation (process %d)",
                self.dataset_name,
                self.num_skipped,
                len(self),
                comm.get_rank(),
            )


class TrainLoader:
    """Endless batches, ``SOLVER.IMS_PER_BATCH`` images over all processes.

    Attributes:
        mapper: its ``num_skipped`` counts the corrupt images that were replaced, in this process's workers.
    """

    def __init__(self, loader: Any, mapper: OVSegDatasetMapper) -> None:
        self.loader = loader
        self.mapper = mapper

    @property
    def num_skipped(self) -> int:
        """Corrupt images met so far by this process."""
        return self.mapper.num_skipped

    def __iter__(self) -> Iterator[list[Record]]:
        yield from self.loader


def build_train_loader(cfg: Any, *, start_iteration: int = 0) -> TrainLoader:
    """The loader of ``DATASETS.TRAIN``: one dataset or several, told apart by each dict's ``dataset_name``.

    Args:
        start_iteration: batches to pass over, so that a resumed run (with ``SEED`` set) goes on with the images that
            an uninterrupted one would see next.
    """
    names = tuple(cfg.DATASETS.TRAIN)
    if not names:
        raise ValueError("DATASETS.TRAIN is empty; expected the name of a registered dataset")
    world_size = comm.get_world_size()
    total = cfg.SOLVER.IMS_PER_BATCH
    if total <= 0 or total % world_size:
        raise ValueError(f"SOLVER.IMS_PER_BATCH is {total}; expected a multiple of the {world_size} process(es)")

    mapper = OVSegDatasetMapper(cfg, is_train=True, dataset_names=names)
    records: list[Record] = []
    for name in names:
        records += load_dataset_dicts(name, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    records = _fraction(cfg, records)
    _logger.info("training on %d images of %s", len(records), ", ".join(names))

    sampler = _train_sampler(cfg, records)
    if start_iteration:
        sampler = _Later(sampler, start_iteration * (total // world_size))
    dataset = MappedDataset(DatasetFromList(records, copy=False), mapper, replace_skipped=True)
    # Other augmentations after a resume than at the start.
    seed_worker = functools.partial(_seed_worker, _process_seed(cfg) + start_iteration)
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        loader = DataLoader(
            dataset,
            sampler=sampler,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            batch_size=1,
            collate_fn=operator.itemgetter(0),
            worker_init_fn=seed_worker,
        )
        return TrainLoader(AspectRatioGroupedDataset(_RaisingLoader(loader), total // world_size), mapper)
    loader = DataLoader(
        dataset,
        batch_sampler=BatchSampler(sampler, total // world_size, drop_last=True),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_as_list,
        worker_init_fn=seed_worker,
    )
    return TrainLoader(_RaisingLoader(loader), mapper)


def build_test_loader(cfg: Any, dataset_name: str) -> EvaluationLoader:
    """The evaluation loader of one dataset: each image once over all processes, one image a batch."""
    mapper = OVSegDatasetMapper(cfg, is_train=False, dataset_names=dataset_name)
    records = load_dataset_dicts(dataset_name, filter_empty=False)
    dataset = MappedDataset(DatasetFromList(records, copy=False), mapper, replace_skipped=False)
    loader = DataLoader(
        dataset,
        batch_sampler=BatchSampler(InferenceSampler(len(dataset)), 1, drop_last=False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_as_list,
    )
    return EvaluationLoader(_RaisingLoader(loader), mapper, dataset_name)


class _Later(Sampler):
    """An endless sampler without its first ``count`` indices."""

    def __init__(self, sampler: Sampler, count: int) -> None:
        self.sampler = sampler
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(self.sampler, self.count, None)


def _fraction(cfg: Any, records: list[Record]) -> list[Record]:
    """DATALOADER.TRAIN_FRACTION of the images, at least one, in their order; the same in all processes and runs."""
    fraction = cfg.DATALOADER.TRAIN_FRACTION
    if not 0 < fraction <= 1:
        raise ValueError(f"DATALOADER.TRAIN_FRACTION is {fraction}; expected a share of the images, in (0, 1]")
    if fraction == 1:
        return records
    seed = max(cfg.SEED, 0)
    # The first of one order of all images: a smaller fraction is a part of a larger one.
    chosen = np.random.default_rng(seed).permutation(len(records))[: max(1, round(fraction * len(records)))]
    _logger.info(
        "DATALOADER.TRAIN_FRACTION %s: %d of %d images, drawn with seed %d", fraction, len(chosen), len(records), seed
    )
    return [records[i] for i in sorted(chosen)]


def _train_sampler(cfg: Any, records: Sequence[Record]) -> Sampler:
    # A set seed fixes the order of images; otherwise the processes agree on a random one.
    seed = cfg.SEED if cfg.SEED >= 0 else None
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return TrainingSampler(len(records), seed=seed)
    if name == "RepeatFactorTrainingSampler":
        # Segments stand for annotations, so that rare classes of panoptic datasets are repeated too.
        annotated = [
            {"annotations": record.get("annotations") or record.get("segments_info", [])} for record in records
        ]
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            annotated, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        return RepeatFactorTrainingSampler(factors, seed=seed)
    raise ValueError(f"DATALOADER.SAMPLER_TRAIN is {name!r}; expected TrainingSampler or RepeatFactorTrainingSampler")


def _process_seed(cfg: Any) -> int:
    """A seed of this process's workers: fixed by SEED when that is set, different on every rank."""
    seed = cfg.SEED if cfg.SEED >= 0 else int.from_bytes(os.urandom(3), "little")
    return seed + 10_000 * comm.get_rank()


def _seed_worker(seed: int, worker_id: int) -> None:
    seed_all_rng((seed + 100 * worker_id) % 2**31)


def _as_list(items: list) -> list:
    return items
