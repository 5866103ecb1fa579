"""See the whole project work: a small world, open-vocabulary training, a table, and a picture with names of yours.

    python tools/quickstart.py            # less than ten minutes on two CPU cores, a minute the second time
    python tools/quickstart.py --force    # train anew

FC-CLIP starts from the mask generator and the frozen tiny CLIP that ship with the package and learns to name masks on
the *seen* classes alone; it is tested on all 72. Beside it: the same masks named by the frozen CLIP without training.
Each step is a command of the project, shown before it runs. Everything lands below --output; an interrupted training
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ovseg_d2  # noqa: F401  (light; hides a warning of detectron2's import)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/ovshapes/fcclip.yaml"
BASELINE_CONFIG = "configs/ovshapes/training_free.yaml"
METRICS = {
    "sem_seg": ("mIoU", "mIoU_seen", "mIoU_unseen", "hIoU"),
    "panoptic_seg": ("PQ", "SQ", "RQ"),
    "segm": ("AP",),
}
NUM_CLASSES = 72


def run(*command: str) -> None:
    """Show and run a command of the project; its failure ends this one."""
    print(f"\n$ {shlex.join(('python', *command))}", flush=True)
    status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if status:
        sys.exit(f"quickstart: stopped, as the command above failed with exit code {status}")


def metrics_of(folder: Path) -> dict[str, float | None]:
    """The table's figures, in percent, from the results of the validation set that a run left."""
    scores = json.loads((folder / "results.json").read_text())["results"]["ovshapes_val"]
    return {name: scores[group].get(name) for group, names in METRICS.items() for name in names}


def table(rows: dict[str, dict[str, float | None]]) -> str:
    """One line a method, figures in percent."""
    columns = [name for names in METRICS.values() for name in names]
    lines = [["percent", *columns]]
    for method, figures in rows.items():
        values = [figures.get(name) for name in columns]
        lines.append([method, *("-" if value is None else f"{value:.1f}" for value in values)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def picture_and_names() -> tuple[str, str]:
    """A validation picture with an unseen thing, and a vocabulary for it: what is there and some of what is not."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    import ovseg_d2.data  # noqa: F401  (registers the datasets)

    metadata = MetadataCatalog.get("ovshapes_val")

    def classes(record: dict[str, Any]) -> list[int]:
        return sorted({segment["category_id"] for segment in record["segments_info"]})

    def unseen_things(record: dict[str, Any]) -> int:
        things = [k for k in classes(record) if k in metadata.thing_dataset_id_to_contiguous_id.values()]
        return sum(not metadata.class_is_seen[k] for k in things)

    record = max(DatasetCatalog.get("ovshapes_val"), key=unseen_things)
    things = set(metadata.thing_dataset_id_to_contiguous_id.values())
    names = [metadata.stuff_classes[k] + ("" if k in things else ":stuff") for k in classes(record)]
    others = [name for name in ("green crescent", "white heart", "sky:stuff") if name not in names]
    return record["file_name"], ", ".join(names + others)


def draw(training: Path, sheet: Path, *, num_images: int) -> None:
    """A sheet of validation pictures beside their ground truth and what the model makes of them."""
    # Heavy imports, not needed to show --help.
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.detection_utils import read_image

    from ovseg_d2.predictor import OpenVocabPredictor
    from ovseg_d2.visualization import ResultDrawer, contact_sheet, ground_truth_results, legible_scale

    metadata = MetadataCatalog.get("ovshapes_val")
    weights = training / "model_final.pth"
    # Scores are low after so short a training.
    predictor = OpenVocabPredictor.from_config_file(training / "config.yaml", weights=weights, score_threshold=0.3)
    drawer = ResultDrawer.from_metadata(metadata)
    rows, names, cell = [], [], 288
    for record in DatasetCatalog.get("ovshapes_val")[:num_images]:
        image = read_image(record["file_name"], "RGB")
        found, truth = predictor(image), ground_truth_results(record, metadata)
        scale = legible_scale(*image.shape[:2], target=cell)
        pictures = [drawer.draw(image, truth, "panoptic", scale=scale, hatch_rest=True)]
        for task in ("panoptic", "semantic", "instance"):
            pictures.append(drawer.draw(image, found, task, scale=scale, hatch_rest=task == "panoptic"))
        rows.append([image, *pictures])
        names.append(Path(record["file_name"]).name)
    columns = ["image", "ground truth", "panoptic", "semantic", "instances"]
    title = "FC-CLIP on OVShapes: trained on 54 seen classes, tested on 72 (hatched: no class)"
    contact_sheet(rows, columns=columns, captions=names, title=title, cell=cell).save(sheet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("output/quickstart"), help="folder of all that it makes (%(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="delete the last training and start anew")
    parser.add_argument(
        "--world", type=int, nargs=2, default=(1000, 200), metavar=("TRAIN", "VAL"), help="pictures (default 1000 200)"
    )
    parser.add_argument("--images", type=int, default=8, help="pictures on the contact sheet (default 8)")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to change in the training"
    )
    args = parser.parse_args()

    output = (ROOT / args.output).resolve()
    training, baseline = output / "training", output / "baseline"
    if args.force:
        for folder in (training, baseline):
            shutil.rmtree(folder, ignore_errors=True)
    os.environ.setdefault("DETECTRON2_DATASETS", str(ROOT / "datasets"))
    start = time.monotonic()
    train, val = map(str, args.world)
    run("datasets/prepare_ovshapes.py", "--train", train, "--val", val)
    if (training / "results.json").exists():
        print(f"\n{training} holds a finished training (--force trains anew)")
    else:
        run("train_net.py", "--config-file", CONFIG, "--resume", "OUTPUT_DIR", str(training), *args.opts)
    if not (baseline / "results.json").exists():
        run("train_net.py", "--config-file", BASELINE_CONFIG, "--eval-only", "OUTPUT_DIR", str(baseline))

    finished = json.loads((training / "results.json").read_text())
    rows = {
        "chance": {"mIoU": 100 / NUM_CLASSES},
        "frozen CLIP, no training": metrics_of(baseline),
        f"FC-CLIP, {finished['iteration']} steps": metrics_of(training),
    }
    results = {"steps": finished["iteration"], "seconds": round(finished["seconds"], 1), "rows": rows}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(training, output / "predictions.png", num_images=args.images)
    picture, names = picture_and_names()
    drawn = output / "your_words.png"
    weights = training / "model_final.pth"
    demo = ["demo/demo.py", "--config-file", str(training / "config.yaml"), "--input", picture, "--output", str(drawn)]
    run(*demo, "--task", "panoptic", "--vocabulary", names, "--opts", "MODEL.WEIGHTS", str(weights))

    print(f"\n{table(rows)}\n")
    print(f"training took {finished['seconds'] / 60:.1f} minutes")
    print(f"pictures  {output / 'predictions.png'}")
    print(f"          {drawn}  (the vocabulary of the command above)")
    print(f"figures   {output / 'results.json'}")
    print(f"weights   {weights}")
    print(f"this run took {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
