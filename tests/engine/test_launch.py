"""What is refused before any process starts, and what becomes of errors."""

import pytest
import torch

from ovseg_d2.engine import launch, load_config, one_line_errors
from ovseg_d2.engine.launch import Place, _process_group
from tests.engine.test_load_config import arguments

CPU = ("MODEL.DEVICE", "cpu")


def devices(args):
    return args.num_gpus, load_config(args.config_file, args.opts).MODEL.DEVICE


def test_one_process_is_this_one():
    assert launch(devices, arguments(*CPU)) == (1, "cpu")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-gpus", 2, "SOLVER.BASE_LRR", 1], "unknown config key SOLVER.BASE_LRR"),
        (["--num-gpus", 99, "MODEL.DEVICE", "cuda"], "99 processes need a GPU each (--num-gpus), found "),
        (
            ["--num-gpus", 2, "MODEL.DEVICE", "cuda:1"],
            "MODEL.DEVICE is 'cuda:1'; expected 'cuda', of which each process",
        ),
        (["--num-machines", 2, "--machine-rank", 2, *CPU], "--machine-rank is 2, expected 0 to 1"),
        (["--num-machines", 2, *CPU], "several machines need tcp://HOST:PORT of the machine with rank 0"),
    ],
)
def test_refused(words, message):
    with pytest.raises(ValueError) as error:
        launch(devices, arguments(*words))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_more_processes_than_gpus(monkeypatch, under_torchrun):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if under_torchrun:
        for key, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
            monkeypatch.setenv(key, str(value))
    with pytest.raises(ValueError, match=r"2 processes need a GPU each \(--num-gpus\), found 1 GPUs"):
        launch(devices, arguments("--num-gpus", 2, "MODEL.DEVICE", "cuda"))


@pytest.mark.parametrize("url", ["tcp://127.0.0.1", "nowhere://x"])
def test_meeting_place_that_is_none(url):
    place = Place(rank=1, world_size=2, local_rank=1, local_size=2, url=url)
    with (
        pytest.raises(ValueError, match=f"process 1 cannot join the others at {url}: ") as error,
        _process_group(place, "gloo"),
    ):
        pass
    assert "\n" not in str(error.value)


def test_own_errors_are_one_line_and_others_keep_their_traceback():
    with pytest.raises(SystemExit, match="^FileNotFoundError: config file nowhere.yaml does not exist$"):
        with one_line_errors():
            load_config("nowhere.yaml")
    with pytest.raises(ValueError), one_line_errors():
        int("a defect")
