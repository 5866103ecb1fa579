"""What the conversion scripts share: processes that are interrupted or killed, and a look at what was written."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.io
from PIL import Image

from ovseg_d2.data.datasets.conversion import map_jobs, run_jobs, run_script, whole_file
from tests.data.test_prepare_scripts import write_ade

Script = Callable[[str], ModuleType]
ONE_PROCESS = ["--workers", "1"]
NUM_FILES = 60


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def square(number: int) -> int:
    if number == 13:
        raise FileNotFoundError(2, "unlucky", "13.png")
    return number**2


def kill_itself(number: int) -> int:
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_processes() -> None:
    numbers = range(12)
    assert list(map_jobs(square, numbers, workers=3)) == [n**2 for n in numbers]
    with pytest.raises(FileNotFoundError, match="unlucky"):
        list(map_jobs(square, range(40), workers=3))


def test_killed_process() -> None:
    """A pool of `multiprocessing` would wait for it for ever."""
    with pytest.raises(ChildProcessError, match="a process was killed, .* with fewer --workers"):
        list(map_jobs(kill_itself, range(40), workers=3))


def write_slowly(name: str, *, folder: Path) -> None:
    path = folder / name
    if not path.exists():
        with whole_file(str(path)) as temporary:
            Path(temporary).write_text("half")
            time.sleep(0.02)
            Path(temporary).write_text("whole")


def write_all(folder: Path) -> int:
    run_jobs(partial(write_slowly, folder=folder), [f"{i}.txt" for i in range(NUM_FILES)], workers=2, description="")
    return 0


def as_script(folder: Path) -> None:
    os.setsid()
    sys.stderr = open(folder.parent / "stderr", "w")
    run_script(partial(write_all, folder))


@pytest.mark.parametrize(("number", "kill", "code"), [(signal.SIGINT, os.killpg, 130), (signal.SIGTERM, os.kill, 143)])
def test_interrupt_and_go_on(tmp_path: Path, number: int, kill: Callable[[int, int], None], code: int) -> None:
    """Ctrl-C goes to all processes, a batch system's stop often to one."""
    folder = tmp_path / "labels"
    folder.mkdir()
    script = multiprocessing.get_context("fork").Process(target=as_script, args=(folder,))
    script.start()
    while not list(folder.glob("*.txt")):
        time.sleep(0.01)
    kill(script.pid, number)
    script.join(60)
    assert script.exitcode == code
    assert ("interrupted: " in (tmp_path / "stderr").read_text()) == (number == signal.SIGINT)
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*.txt")}
    assert 0 < len(made) < NUM_FILES and set(folder.iterdir()) == set(made)
    assert all(path.read_text() == "whole" for path in made)
    write_all(folder)
    assert len(list(folder.glob("*.txt"))) == NUM_FILES
    assert all(path.stat().st_mtime_ns == before for path, before in made.items())


def test_script_that_fails() -> None:
    def main() -> int:
        raise ValueError("13 is no label")

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="^error: 13 is no label$"):
        run_script(main)
    assert signal.getsignal(signal.SIGTERM) is handler


def write_10k(base: Path) -> None:
    write(base / "images" / "1.jpg", np.zeros((4, 5, 3), np.uint8))
    (base / "annotations").mkdir()
    scipy.io.savemat(base / "annotations" / "1.mat", {"S": np.ones((4, 5), np.uint8)})
    (base / "imageLists").mkdir()
    (base / "imageLists" / "test.txt").write_text("1\n")


def test_images_that_went_are_placed_again(script: Script, root: Path) -> None:
    base = root / "coco" / "coco_stuff_10k"
    write_10k(base)
    main = script("prepare_coco_stuff").main
    arguments = ["--version", "10k", "--splits", "val", *ONE_PROCESS]
    main(arguments)
    placed = base / "images_detectron2" / "test"
    (placed / "1.jpg").unlink()
    main(arguments)
    # A link that takes the place of another one to the same file leaves nothing beside it.
    main([*arguments, "--force"])
    assert [path.name for path in placed.iterdir()] == ["1.jpg"]


def test_empty_download(script: Script, root: Path) -> None:
    (root / "coco" / "stuffthingmaps" / "val2017").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"val2017: there is nothing to convert, as the source has no label files"):
        script("prepare_coco_stuff").main(["--splits", "val", *ONE_PROCESS])


def test_panoptic_files_are_looked_at(script: Script, root: Path) -> None:
    base = write_ade(root, (1, 100))
    main = partial(script("prepare_ade20k").main, ["--splits", "val", *ONE_PROCESS])
    main()
    (path,) = (base / "ade20k_panoptic_val").iterdir()
    whole = path.read_bytes()
    for content, message in (
        (whole[:40], "1 of 1 label files cannot be read: "),
        (
            np.full((2, 2, 3), 200, np.uint8),
            r"1 of 1 label files are not of their image's size.*; label 13158600 \(4 pix",
        ),
    ):
        path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
        with pytest.raises(ValueError, match=f"ade20k_panoptic_val: {message}.*; --force writes them again"):
            main()
    path.unlink()  # half-prepared: made again
    main()
    assert path.read_bytes() == whole


def test_coco_images_of_other_sizes(script: Script, root: Path) -> None:
    coco = root / "coco"
    write(coco / "val2017" / "1.jpg", np.zeros((4, 5, 3), np.uint8))
    write(coco / "panoptic_val2017" / "1.png", np.zeros((5, 4, 3), np.uint8))
    content = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": []}],
        "categories": [{"id": 1, "name": "cat", "isthing": 1}],
    }
    (coco / "annotations").mkdir()
    (coco / "annotations" / "panoptic_val2017.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"not of their image's size: 1.png \(5 x 4, image 4 x 5 \(height x width\)\)"):
        script("prepare_coco").main(["--splits", "val", *ONE_PROCESS])
