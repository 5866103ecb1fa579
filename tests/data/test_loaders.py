"""Loaders: what is drawn, in which process, and what happens to images that cannot be decoded."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.utils import comm

from ovseg_d2.data import build_test_loader, build_train_loader
from ovseg_d2.data.build import _fraction
from tests.data.coded_data import CodedData, data_cfg, write_json


def ids(batches: Any, count: int) -> list[list[tuple[str, int]]]:
    """(dataset, image id) of the first ``count`` batches."""
    return [[(r["dataset_name"], r["image_id"]) for r in batch] for batch in itertools.islice(batches, count)]


def break_image(coded: CodedData, index: int, content: bytes | None = None) -> Path:
    """Cut a picture off in the middle (or overwrite it)."""
    path = coded.root / "images" / f"picture{index}.png"
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_training_draws_every_image(coded: CodedData, workers: int) -> None:
    loader = build_train_loader(data_cfg("coded_panoptic", "DATALOADER.NUM_WORKERS", workers))
    drawn = ids(iter(loader), 3)
    assert [len(batch) for batch in drawn] == [2, 2, 2]
    flat = list(itertools.chain(*drawn))
    assert set(flat[:3]) == set(flat[3:]) == {("coded_panoptic", i) for i in range(3)}


def test_seed_fixes_the_order_and_the_augmentation(coded: CodedData) -> None:
    def first_batches(seed: int) -> list[torch.Tensor]:
        cfg = data_cfg("coded_panoptic", "SEED", seed, "DATALOADER.NUM_WORKERS", 2, "INPUT.PIPELINE", "lsj")
        cfg.INPUT.IMAGE_SIZE = 32
        batches = itertools.islice(iter(build_train_loader(cfg)), 4)
        return [record["image"] for batch in batches for record in batch]

    first, again, other = first_batches(3), first_batches(3), first_batches(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert len({tuple(image.flatten()[:200].tolist()) for image in first}) > 4  # not the same draw again and again


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_two_processes_draw_what_one_draws(coded: CodedData, monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    cfg = data_cfg("coded_panoptic", "DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", 0.5)
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    one = ids(iter(build_train_loader(cfg)), 6)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        shares.append(ids(iter(build_train_loader(cfg)), 6))
    assert [set(batch) for batch in one] == [set(a + b) for a, b in zip(*shares, strict=True)]


def test_several_data_sets(coded: CodedData, tmp_path: Path) -> None:
    second = CodedData(tmp_path / "second", "second")
    second.register()
    try:
        cfg = data_cfg("coded_panoptic")
        cfg.DATASETS.TRAIN = ("coded_panoptic", "second_panoptic")
        flat = list(itertools.chain(*ids(iter(build_train_loader(cfg)), 3)))
    finally:
        second.unregister()
    assert set(flat) == {(name, i) for name in cfg.DATASETS.TRAIN for i in range(3)}


def test_aspect_ratio_grouping(coded: CodedData) -> None:
    cfg = data_cfg("coded_panoptic", "DATALOADER.ASPECT_RATIO_GROUPING", True)
    for batch in itertools.islice(iter(build_train_loader(cfg)), 8):
        assert len({record["width"] > record["height"] for record in batch}) == 1


@pytest.mark.parametrize(("filter_empty", "expected"), [(True, {1, 2}), (False, {0, 1, 2})])
def test_images_without_annotations(coded: CodedData, filter_empty: bool, expected: set[int]) -> None:
    path = coded.root / "panoptic.json"
    content = json.loads(path.read_text())
    for segment in content["annotations"][0]["segments_info"]:
        segment["iscrowd"] = 1
    write_json(path, content)
    cfg = data_cfg("coded_panoptic", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", filter_empty)
    drawn = itertools.chain(*ids(iter(build_train_loader(cfg)), 6))
    assert {image_id for _, image_id in drawn} == expected


def fraction_of(count: int, fraction: float, seed: int) -> list[int]:
    cfg = data_cfg("coded_panoptic", "SEED", seed, "DATALOADER.TRAIN_FRACTION", fraction)
    return [record["index"] for record in _fraction(cfg, [{"index": i} for i in range(count)])]


@pytest.mark.parametrize("seed", [-1, 0, 3])
def test_a_smaller_fraction_is_part_of_a_larger_one(coded: CodedData, seed: int) -> None:
    subsets = [fraction_of(1000, fraction, seed) for fraction in (0.001, 0.01, 0.1, 0.5, 1.0)]
    assert [len(subset) for subset in subsets] == [1, 10, 100, 500, 1000]
    assert all(set(a) < set(b) and b == sorted(b) for a, b in itertools.pairwise(subsets))
    assert subsets[2] == fraction_of(1000, 0.1, seed)  # also without a seed, for a resume and for other processes
    assert subsets[2] != fraction_of(1000, 0.1, 4)
    assert fraction_of(3, 0.001, seed) == fraction_of(3, 0.3, seed)  # at least one


def test_fraction_of_the_training_images(
    coded: CodedData, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = data_cfg("coded_panoptic", "DATALOADER.TRAIN_FRACTION", 0.7)
    with caplog.at_level(logging.INFO):
        drawn = set(itertools.chain(*ids(iter(build_train_loader(cfg)), 6)))
    assert len(drawn) == 2 and caplog.text.count("TRAIN_FRACTION 0.7: 2 of 3 images, drawn with seed 7") == 1
    later = set(itertools.chain(*ids(iter(build_train_loader(cfg, start_iteration=5)), 6)))
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(comm, "get_rank", lambda: 1)
    assert drawn == later == set(itertools.chain(*ids(iter(build_train_loader(cfg)), 6)))


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_training_image_is_replaced_and_counted(
    coded: CodedData, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = break_image(coded, 1)
    loader = build_train_loader(data_cfg("coded_panoptic", "DATALOADER.NUM_WORKERS", workers))
    with caplog.at_level(logging.WARNING):
        batches = ids(iter(loader), 6)
    assert all(len(batch) == 2 for batch in batches)
    assert {image_id for batch in batches for _, image_id in batch} == {0, 2}
    assert loader.num_skipped >= 4  # once an epoch; workers may be ahead
    if workers == 0:
        assert str(path) in caplog.text


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_corrupt_training_image_can_be_fatal(coded: CodedData, content: bytes | None) -> None:
    break_image(coded, 1, content)
    cfg = data_cfg("coded_panoptic", "DATALOADER.ON_CORRUPT_IMAGE", "raise")
    with pytest.raises(ValueError, match=r"picture1.png cannot be decoded") as caught:
        ids(iter(build_train_loader(cfg)), 6)
    assert "\n" not in str(caught.value)


def test_corrupt_label_file_counts_as_a_corrupt_image(coded: CodedData) -> None:
    (coded.root / "panoptic" / "picture2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    loader = build_train_loader(data_cfg("coded_panoptic"))
    assert {image_id for batch in ids(iter(loader), 6) for _, image_id in batch} == {0, 1}
    assert loader.num_skipped > 0


def test_all_images_corrupt(coded: CodedData) -> None:
    for index in range(3):
        break_image(coded, index)
    with pytest.raises(ValueError, match="none of the 3 training images can be decoded"):
        next(iter(build_train_loader(data_cfg("coded_panoptic"))))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_errors_of_workers_keep_their_own_words(coded: CodedData, workers: int, training: bool) -> None:
    cfg = data_cfg("coded_panoptic", "DATALOADER.NUM_WORKERS", workers)
    loader = build_train_loader(cfg) if training else build_test_loader(cfg, "coded_panoptic")
    (coded.root / "images" / "picture1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"^image .*picture1.png does not exist$"):
        ids(iter(loader), 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_image_once(coded: CodedData, workers: int) -> None:
    loader = build_test_loader(data_cfg("coded_panoptic", "DATALOADER.NUM_WORKERS", workers), "coded_panoptic")
    assert len(loader) == 3
    for _ in range(2):  # a loader can be used again
        assert ids(iter(loader), 9) == [[("coded_panoptic", i)] for i in range(3)]
    assert loader.num_skipped == 0


def test_corrupt_evaluation_image_is_fatal(coded: CodedData) -> None:
    break_image(coded, 1)
    loader = build_test_loader(data_cfg("coded_panoptic"), "coded_panoptic")
    with pytest.raises(ValueError, match=r"picture1.png cannot be decoded"):
        ids(iter(loader), 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_evaluation_image_is_left_out_on_request(
    coded: CodedData, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    break_image(coded, 1)
    cfg = data_cfg("coded_panoptic", "TEST.ON_CORRUPT_IMAGE", "skip", "DATALOADER.NUM_WORKERS", workers)
    loader = build_test_loader(cfg, "coded_panoptic")
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert ids(iter(loader), 9) == [[("coded_panoptic", 0)], [("coded_panoptic", 2)]]
        assert loader.num_skipped == 1
        assert "1 of 3 images could not be decoded and are missing from the evaluation" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.IMS_PER_BATCH", 0], r"IMS_PER_BATCH is 0; expected a multiple of the 1 process"),
        (["DATALOADER.SAMPLER_TRAIN", "Mine"], r"SAMPLER_TRAIN is 'Mine'; expected TrainingSampler or Repeat"),
        (["DATASETS.TRAIN", ()], r"DATASETS.TRAIN is empty"),
        (["DATALOADER.TRAIN_FRACTION", 0.0], r"TRAIN_FRACTION is 0.0; expected a share of the images, in \(0, 1\]"),
        (["DATALOADER.TRAIN_FRACTION", 1.5], r"DATALOADER.TRAIN_FRACTION is 1.5; expected"),
        (["DATALOADER.TRAIN_FRACTION", float("nan")], r"DATALOADER.TRAIN_FRACTION is nan; expected"),
        (["DATASETS.TRAIN", ("coded_panoptik",)], r"'coded_panoptik' is not registered; did you mean coded_panoptic"),
    ],
)
def test_bad_configuration(coded: CodedData, overrides: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_train_loader(data_cfg("coded_panoptic", *overrides))


@pytest.fixture(autouse=True)
def _detectron2_logs_propagate() -> Iterator[None]:
    """detectron2's setup_logger, if another test called it, stops propagation to pytest's log capture."""
    names = ("ovseg_d2", "ovseg_d2.data")
    before = {name: logging.getLogger(name).propagate for name in names}
    for name in names:
        logging.getLogger(name).propagate = True
    yield
    for name, propagate in before.items():
        logging.getLogger(name).propagate = propagate
