"""The demo's command line: pictures, video and data out of files in; bad files are reported."""

import importlib.util
import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from ovseg_d2.evaluation.panoptic_png import read_panoptic_png
from tests.demo.tiny_model import CLASSES, DATASET, write_tiny_model

SCRIPT = Path(__file__).parents[2] / "demo" / "demo.py"
SAMPLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_panoptic_sample" / "input_images"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model_args(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photos(tmp_path):
    """A folder with two pictures, a broken one and a text file."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.jpg")
    Image.fromarray(pixels[:, :64]).convert("L").save(folder / "b.png")
    (folder / "c.jpg").write_bytes(b"not a picture")
    (folder / "notes.txt").write_text("not to be read")
    return folder


@pytest.fixture
def run(demo, model_args, caplog):
    """Runs the demo and returns its exit code and log."""

    def run(*args) -> tuple[int, str]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            code = demo.main([*map(str, args), *model_args])
        return code, caplog.text

    return run


def test_folder_with_an_unreadable_picture(run, photos, tmp_path):
    code, log = run("--input", photos, "--task", "panoptic", "--output", tmp_path / "drawn")
    assert code == 1
    assert "skipped" in log and "c.jpg" in log and "2 of 3 images done, 1 could not be read" in log
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["a.jpg", "b.png"]
    with Image.open(tmp_path / "drawn" / "a.jpg") as drawn:
        assert drawn.size == (360, 240)  # enlarged four times, so that names are legible


def test_glob_and_default_task(run, photos, tmp_path):
    code, log = run("--input", photos / "[ab].*", "--output", tmp_path / "drawn")
    assert code == 0 and "2 of 2 images done" in log
    assert len(list((tmp_path / "drawn").iterdir())) == 2


def test_one_picture_into_one_file(run, photos, tmp_path):
    code, _ = run("--input", photos / "a.jpg", "--output", tmp_path / "new" / "x.png")
    assert code == 0 and (tmp_path / "new" / "x.png").is_file()


def test_truncated_and_absent_files(run, photos, tmp_path):
    content = (photos / "a.jpg").read_bytes()
    (photos / "half.jpg").write_bytes(content[: len(content) // 2])
    code, log = run("--input", photos / "half.jpg", photos / "absent.jpg", "--output", tmp_path / "drawn")
    assert code == 1 and "half.jpg" in log and "absent.jpg" in log and "0 of 2" in log


@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_data(run, photos, tmp_path, task):
    args = ("--task", task, "--confidence-threshold", 0, "--json", tmp_path / "data")
    code, _ = run("--input", photos / "a.jpg", *args)
    assert code == 0
    content = json.loads((tmp_path / "data" / "a.json").read_text())
    assert content["task"] == task and content["source"].endswith("a.jpg")
    assert (tmp_path / "data" / "a.png").is_file() == (task != "instance")
    if task == "semantic":
        labels = np.asarray(Image.open(tmp_path / "data" / content["png"]))
        assert {c["category_id"]: c["area"] for c in content["classes"]} == dict(
            zip(*map(np.ndarray.tolist, np.unique(labels, return_counts=True)), strict=True)
        )
    elif task == "panoptic":
        ids = read_panoptic_png(tmp_path / "data" / content["png"])
        assert {s["id"]: s["area"] for s in content["segments_info"]} == {
            s["id"]: int((ids == s["id"]).sum()) for s in content["segments_info"]
        }
        assert content["segments_info"]
    else:
        assert content["instances"] and all(i["segmentation"]["size"] == [60, 90] for i in content["instances"])


@pytest.mark.parametrize(("task", "key"), [("instance", "instances"), ("panoptic", "segments_info")])
def test_confidence_threshold(run, photos, tmp_path, task, key):
    args = ("--input", photos / "a.jpg", "--task", task, "--json", tmp_path / "data")
    run(*args, "--confidence-threshold", 1.0)
    assert json.loads((tmp_path / "data" / "a.json").read_text())[key] == []


def test_pictures_of_one_name(run, photos, tmp_path):
    (photos / "more").mkdir()
    (photos / "a.jpg").rename(photos / "more" / "b.jpg")
    code, _ = run("--input", photos / "b.png", photos / "more", "--output", tmp_path / "drawn")
    assert code == 0 and sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["b.png", "b_2.jpg"]


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    codec = cv2.VideoWriter_fourcc(*("mp4v" if path.suffix == ".mp4" else "MJPG"))
    writer = cv2.VideoWriter(str(path), codec, 10, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_video(run, tmp_path, suffix):
    write_video(tmp_path / f"in{suffix}", [np.full((64, 96, 3), 60 * i, dtype=np.uint8) for i in range(3)])
    args = ("--output", tmp_path / f"out{suffix}", "--json", tmp_path / "data", "--task", "semantic")
    code, log = run("--video-input", tmp_path / f"in{suffix}", *args)
    assert code == 0 and "3 frames done" in log
    capture = cv2.VideoCapture(str(tmp_path / f"out{suffix}"))
    sizes = []
    while (frame := capture.read()[1]) is not None:
        sizes.append(frame.shape)
    assert sizes == [(256, 384, 3)] * 3
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    assert json.loads((tmp_path / "data" / "in_000002.json").read_text())["frame"] == 2


def test_video_colours(run, demo, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(demo.OpenVocabPredictor, "draw", lambda self, image, *_, **__: seen.append(image) or image)
    write_video(tmp_path / "in.avi", [np.full((64, 96, 3), (200, 30, 30), dtype=np.uint8)])  # blue: OpenCV has BGR
    assert run("--video-input", tmp_path / "in.avi", "--output", tmp_path / "out.avi")[0] == 0
    frame = cv2.VideoCapture(str(tmp_path / "out.avi")).read()[1]
    assert seen[0][0, 0].tolist() == pytest.approx([30, 30, 200], abs=12)
    assert frame[0, 0].tolist() == pytest.approx([200, 30, 30], abs=12)


def test_unreadable_video(run, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    code, log = run("--video-input", tmp_path / "broken.mp4", "--output", tmp_path / "out.mp4")
    assert code == 1 and "broken.mp4" in log


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--input", "{photos}/*.gif", "--output", "x"), "no pictures there"),
        (("--input", "{photos}", "--output", "x.jpg"), "is one file, but there are 3 pictures"),
        (("--input", "{photos}", "--output", "{photos}"), "would overwrite"),
        (("--video-input", "absent.mp4", "--output", "x"), "absent.mp4: no such file"),
    ],
)
def test_wrong_arguments(run, photos, args, message):
    code, log = run(*(a.format(photos=photos) for a in args))
    assert code == 2 and message in log


def test_without_a_window(run, demo, photos, monkeypatch):
    def no_window(*args):
        raise cv2.error("not implemented")

    monkeypatch.setattr(demo.cv2, "imshow", no_window)
    code, log = run("--input", photos / "a.jpg")
    assert code == 2 and "give --output or --json" in log


def test_window_until_the_user_quits(run, demo, photos, monkeypatch):
    shown = []
    monkeypatch.setattr(demo.cv2, "imshow", lambda title, picture: shown.append(title))
    monkeypatch.setattr(demo.cv2, "waitKey", lambda delay: ord("q"))
    code, _ = run("--input", photos / "a.jpg", photos / "b.png")
    assert code == 0 and shown == ["a.jpg"]


def test_help_has_examples(demo, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--help"])
    assert stop.value.code == 0
    assert "examples:" in (text := capsys.readouterr().out) and "--video-input" in text


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="needs the COCO panoptic sample")
def test_real_photographs(run, tmp_path):
    code, _ = run("--input", SAMPLE, "--task", "panoptic", "--output", tmp_path / "drawn")
    assert code == 0
    for drawn in (tmp_path / "drawn").iterdir():
        with Image.open(drawn) as picture, Image.open(SAMPLE / drawn.name) as photograph:
            assert picture.size == photograph.size


def test_vocabularies(run, photos, tmp_path):
    (tmp_path / "classes.txt").write_text("one  # the first\ntwo, zwei\nthree:stuff\n")
    for flags, names in [
        (["--vocabulary", "x, y, z"], {"x", "y", "z"}),
        (["--vocabulary-file", tmp_path / "classes.txt"], {"one", "two", "three"}),
        (["--dataset", DATASET], set(CLASSES)),
    ]:
        code, _ = run("--input", photos / "a.jpg", "--task", "semantic", "--json", tmp_path / "data", *flags)
        found = {c["name"] for c in json.loads((tmp_path / "data" / "a.json").read_text())["classes"]}
        assert code == 0 and found and found <= names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocabulary", "a, b"], "error: Mask2Former has a closed vocabulary: the 3 classes"),
        (["--vocabulary", "a, , b"], "error: vocabulary 'a, , b', class 2: empty name"),
        (["--vocabulary-file", "nowhere.txt"], "error: vocabulary nowhere.txt does not exist"),
        (["--vocabulary-file", "classes.csv"], "unknown suffix '.csv', allowed are .txt, .json"),
        (["--dataset", "demo_tests_tree_classes"], "error: dataset 'demo_tests_tree_classes' is not registered"),
    ],
)
def test_bad_vocabularies(run, photos, flags, message):
    code, log = run("--input", photos / "a.jpg", "--output", photos, *flags)
    assert code == 2 and message in log and "Traceback" not in log


def test_one_vocabulary_at_a_time(demo, photos, capsys):
    with pytest.raises(SystemExit):
        demo.parse_args(["--config-file", "x", "--input", "y", "--vocabulary", "a", "--dataset", "b"])
    assert "not allowed with argument" in capsys.readouterr().err
