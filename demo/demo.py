"""Segments pictures, videos or a webcam's stream. See --help."""

from __future__ import annotations

import argparse
import glob
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from ovseg_d2.data.check import require_registered
from ovseg_d2.data.image_io import CorruptImageError, read_image
from ovseg_d2.data.vocabulary import vocabulary_from_file, vocabulary_from_string
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.evaluation.panoptic_png import write_panoptic_png
from ovseg_d2.evaluation.results import write_json
from ovseg_d2.predictor import OpenVocabPredictor
from ovseg_d2.structures import Vocabulary
from ovseg_d2.visualization import TASKS, legible_scale

logger = logging.getLogger("demo")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
VIDEO_CODECS = {".mp4": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".avi": "MJPG"}
EXAMPLES = """\
examples:
  # pictures into a folder
  python demo/demo.py --config-file CONFIG.yaml --input photos/*.jpg --output drawn --opts MODEL.WEIGHTS model.pth

  # a folder of pictures: drawn ones, and masks and classes as data for other programs
  python demo/demo.py --config-file CONFIG.yaml --input photos --task panoptic --output drawn --json data \\
      --opts MODEL.WEIGHTS model.pth

  # only objects that the model is sure of, on the CPU
  python demo/demo.py --config-file CONFIG.yaml --input a.jpg --output a_drawn.jpg --task instance \\
      --confidence-threshold 0.8 --opts MODEL.WEIGHTS model.pth MODEL.DEVICE cpu

  # other classes, in words of your own (models with an open vocabulary)
  python demo/demo.py --config-file CONFIG.yaml --input a.jpg --output drawn \\
      --vocabulary "red star, blue ring, grass:stuff" --opts MODEL.WEIGHTS model.pth
  python demo/demo.py --config-file CONFIG.yaml --input a.jpg --output drawn --vocabulary-file classes.txt \\
      --opts MODEL.WEIGHTS model.pth

  # a video into a video; without --output pictures and videos are shown in a window (Esc or q closes it)
  python demo/demo.py --config-file CONFIG.yaml --video-input street.mp4 --output street_drawn.mp4 \\
      --opts MODEL.WEIGHTS model.pth

--vocabulary: classes stand between commas; a class is a countable thing unless :stuff follows it. With synonyms, pipes
stand between classes and commas between their names: "couch, sofa | grass, lawn:stuff".
--vocabulary-file: a .txt with one class a line ("couch, sofa"; # starts a comment), or a .json with a list of such
lines or of {"name": "couch", "synonyms": ["sofa"], "isthing": true}.

--opts comes last: everything behind it is KEY VALUE pairs of the config.
The exit code is 0 if all went well, 1 if some file could not be read, 2 for wrong arguments.
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Segment pictures, a video or a webcam's stream, and draw, show or save what is found.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the model's config")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="pictures, folders of pictures, or quoted globs")
    source.add_argument("--video-input", metavar="FILE", help="a video file")
    source.add_argument("--webcam", action="store_true", help="the first camera of this computer")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="a folder, or a file for a single picture or video; shown in a window if absent",
    )
    parser.add_argument(
        "--json",
        metavar="FOLDER",
        help="also write results as data: NAME.json, and NAME.png of classes (semantic) or segment ids (panoptic)",
    )
    classes = parser.add_mutually_exclusive_group()
    classes.add_argument("--vocabulary", metavar="CLASSES", help='what to look for, e.g. "red star, blue ring, grass"')
    classes.add_argument("--vocabulary-file", metavar="FILE", help="what to look for, a .txt or .json file")
    classes.add_argument(
        "--dataset",
        metavar="NAME",
        help="what to look for: the classes of a registered dataset (default: the first one in the config)",
    )
    parser.add_argument("--task", choices=TASKS, help="what to find (default: the first in MODEL.OVSEG.TEST.TASKS)")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        metavar="P",
        help="smallest score of instances (default 0.5), smallest class probability of panoptic segments",
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="overrides of the config"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_args(argv)
    try:
        if args.input:
            paths = find_images(args.input)
        predictor = build_predictor(args)
        task = args.task or predictor.tasks[0]
        if args.input:
            return run_images(predictor, task, paths, args.output, args.json)
        return run_video(predictor, task, args.video_input, args.output, args.json)
    except (ValueError, OSError) as error:
        logger.error("error: %s", error)
        return 2


def build_predictor(args: argparse.Namespace) -> OpenVocabPredictor:
    opts = list(args.opts)
    kwargs: dict[str, Any] = {"vocabulary": chosen_vocabulary(args)}
    if args.confidence_threshold is not None:
        opts += ["MODEL.OVSEG.TEST.OBJECT_MASK_THRESHOLD", str(args.confidence_threshold)]
        kwargs["score_threshold"] = args.confidence_threshold
    return OpenVocabPredictor.from_config_file(
        args.config_file, tasks=[args.task] if args.task else None, opts=opts, **kwargs
    )


def chosen_vocabulary(args: argparse.Namespace) -> Vocabulary | str | None:
    """What --vocabulary, --vocabulary-file or --dataset name; None for the config's own classes."""
    if args.vocabulary is not None:
        return vocabulary_from_string(args.vocabulary)
    if args.vocabulary_file is not None:
        return vocabulary_from_file(args.vocabulary_file)
    if args.dataset is not None:
        load_config(args.config_file, args.opts)  # registers the datasets that DATASETS.REGISTER describes
        require_registered(args.dataset)
    return args.dataset


def find_images(patterns: Sequence[str]) -> list[Path]:
    """Files that paths, folders and globs name, in their order."""
    paths: list[Path] = []
    for pattern in patterns:
        if Path(pattern).is_dir():
            found = sorted(p for p in Path(pattern).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        elif Path(pattern).exists() or not glob.has_magic(pattern):
            found = [Path(pattern)]  # one that does not exist is reported with those that cannot be read
        else:
            found = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
        if not found:
            raise ValueError(f"--input {pattern}: no pictures there (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
        paths += found
    return paths


def run_images(
    predictor: OpenVocabPredictor, task: str, paths: Sequence[Path], output: str | None, json_folder: str | None
) -> int:
    failed = 0
    targets = output_paths(paths, output)
    for path, target in zip(tqdm(paths, unit="image", disable=len(paths) == 1), targets, strict=True):
        try:
            image = read_image(str(path), "RGB")
        except (OSError, CorruptImageError) as error:
            logger.error("skipped %s: %s", path, error)
            failed += 1
            continue
        results = predictor(image)
        picture = predictor.draw(image, results, task, scale=legible_scale(*image.shape[:2]))
        if output:
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(target, quality=95)
        if json_folder:
            write_data(predictor, results, task, Path(json_folder) / target.stem, source=str(path))
        if not output and not json_folder and not show(path.name, picture, wait=True):
            break
    logger.info(
        "%d of %d images done%s", len(paths) - failed, len(paths), f", {failed} could not be read" if failed else ""
    )
    return 1 if failed else 0


def output_paths(paths: Sequence[Path], output: str | None) -> list[Path]:
    """A file for each input: ``output`` itself if it names one, else distinct names in that folder."""
    if output and Path(output).suffix.lower() in IMAGE_SUFFIXES:
        if len(paths) != 1:
            raise ValueError(f"--output {output} is one file, but there are {len(paths)} pictures; give a folder")
        return [Path(output)]
    seen: Counter[str] = Counter()
    targets = []
    for path in paths:
        seen[path.stem] += 1
        number = f"_{seen[path.stem]}" if seen[path.stem] > 1 else ""
        suffix = path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else ".png"
        targets.append(Path(output or ".") / f"{path.stem}{number}{suffix}")
        if output and targets[-1].resolve() == path.resolve():
            raise ValueError(f"--output {output} would overwrite {path}; give another folder")
    return targets


def run_video(
    predictor: OpenVocabPredictor, task: str, source: str | None, output: str | None, json_folder: str | None
) -> int:
    """A video file, or the webcam if ``source`` is None."""
    name = source or "webcam"
    if source and not Path(source).is_file():
        raise FileNotFoundError(f"--video-input {source}: no such file")
    capture = cv2.VideoCapture(source or 0)
    if not capture.isOpened():
        logger.error("cannot read %s", name)
        return 1
    writer = None
    done = 0
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if source else None
    try:
        for frame in tqdm(frames(capture), total=total, unit="frame"):
            results = predictor(frame)
            picture = predictor.draw(frame, results, task, scale=legible_scale(*frame.shape[:2]))
            if output:
                writer = writer or open_writer(video_path(output, name), picture, capture.get(cv2.CAP_PROP_FPS))
                writer.write(picture[:, :, ::-1])
            if json_folder:
                stem = Path(json_folder) / f"{Path(name).stem}_{done:06d}"
                write_data(predictor, results, task, stem, source=name, frame=done)
            done += 1
            if not output and not json_folder and not show(name, picture, wait=False):
                break
    except KeyboardInterrupt:
        logger.info("stopped")
    finally:
        capture.release()
        if writer:
            writer.release()
    logger.info("%d frames done", done)
    return 0 if done else 1


def frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """RGB frames (H, W, 3) uint8 until the stream ends."""
    while True:
        success, frame = capture.read()
        if not success:
            return
        yield np.ascontiguousarray(frame[:, :, ::-1])


def video_path(output: str, name: str) -> Path:
    """``output`` itself if it names a video, else a file in that folder."""
    return Path(output) if Path(output).suffix.lower() in VIDEO_CODECS else Path(output) / f"{Path(name).stem}.mp4"


def open_writer(path: Path, picture: np.ndarray, fps: float) -> cv2.VideoWriter:
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = cv2.VideoWriter_fourcc(*VIDEO_CODECS[path.suffix.lower()])
    writer = cv2.VideoWriter(str(path), codec, fps or 25.0, (picture.shape[1], picture.shape[0]))
    if not writer.isOpened():
        raise ValueError(f"--output {path}: OpenCV cannot write this kind of video here, try .avi")
    return writer


def write_data(
    predictor: OpenVocabPredictor, results: dict, task: str, stem: Path, *, source: str, **extra: int
) -> None:
    """STEM.json, and STEM.png if the task has a map."""
    content, ids = predictor.to_json(results, task)
    stem.parent.mkdir(parents=True, exist_ok=True)
    content = {"source": source, **extra, **content}
    if ids is not None:
        png = stem.parent / f"{stem.name}.png"
        if task == "panoptic":
            write_panoptic_png(png, ids)
        else:
            Image.fromarray(ids.astype(np.uint16 if len(predictor.vocabulary) > 256 else np.uint8)).save(png)
        content["png"] = png.name
    write_json(stem.parent / f"{stem.name}.json", content)


def show(title: str, picture: np.ndarray, *, wait: bool) -> bool:
    """Shows a picture; False if the user wants no more."""
    try:
        cv2.imshow(title, picture[:, :, ::-1])
    except cv2.error as error:
        raise ValueError("no window can be opened here: give --output or --json") from error
    return cv2.waitKey(0 if wait else 1) not in (27, ord("q"))


if __name__ == "__main__":
    sys.exit(main())
