"""See the whole project work: generate a small world, train a Mask2Former in it, evaluate it and draw what it found.

    python tools/quickstart.py            # about ten minutes on two CPU cores, a minute the second time
    python tools/quickstart.py --force    # train anew

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
CONFIG = "configs/ovshapes/mask2former.yaml"
METRICS = {
    "semantic": ("sem_seg", ("mIoU", "mIoU_seen", "mIoU_unseen", "hIoU")),
    "panoptic": ("panoptic_seg", ("PQ", "SQ", "RQ")),
    "instance": ("segm", ("AP",)),
}
# All 72 classes are trained, so that the zero-shot split of the validation set means nothing here.
WITHOUT_SPLIT = {"mIoU_seen", "mIoU_unseen", "hIoU"}


def run(*command: str) -> None:
    """Show and run a command of the project; its failure ends this one."""
    print(f"\n$ {shlex.join(('python', *command))}", flush=True)
    status = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if status:
        sys.exit(f"quickstart: stopped, as the command above failed with exit code {status}")


def metrics_of(run_results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """The table's figures, in percent, from a training run's results of the validation set."""
    scores = run_results["results"]["ovshapes_val"]
    return {
        task: {name: None if name in WITHOUT_SPLIT else scores[group].get(name) for name in names}
        for task, (group, names) in METRICS.items()
    }


def table(results: dict[str, Any]) -> str:
    cells = [
        (name, "-" if value is None else f"{value:.1f}")
        for task in METRICS
        for name, value in results[task].items()
        if value is not None
    ]
    widths = [max(len(name), len(value)) + 3 for name, value in cells]
    head = "".join(name.rjust(width) for (name, _), width in zip(cells, widths, strict=True))
    body = "".join(value.rjust(width) for (_, value), width in zip(cells, widths, strict=True))
    how = f"{results['method']}, {results['steps']} steps, {results['seconds'] / 60:.1f} minutes (percent)"
    return f"{how}\n{head}\n{body}"


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
    predictor = OpenVocabPredictor.from_config_file(training / "config.yaml", weights=weights, score_threshold=0.1)
    drawer = ResultDrawer.from_metadata(metadata)
    rows, names = [], []
    for record in DatasetCatalog.get("ovshapes_val")[:num_images]:
        image = read_image(record["file_name"], "RGB")
        found, truth = predictor(image), ground_truth_results(record, metadata)
        scale = legible_scale(*image.shape[:2])
        pictures = [drawer.draw(image, truth, "panoptic", scale=scale)]
        pictures += [drawer.draw(image, found, task, scale=scale) for task in ("panoptic", "semantic", "instance")]
        rows.append([image, *pictures])
        names.append(Path(record["file_name"]).name)
    columns = ["image", "ground truth", "panoptic", "semantic", "instances"]
    contact_sheet(rows, columns=columns, captions=names, title="Mask2Former on OVShapes").save(sheet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/quickstart"), help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="delete the last training and start anew")
    parser.add_argument(
        "--world", type=int, nargs=2, default=(1000, 200), metavar=("TRAIN", "VAL"), help="pictures (default 1000 200)"
    )
    parser.add_argument("--images", type=int, default=8, help="pictures on the contact sheet (default 8)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values for train_net.py")
    args = parser.parse_args()

    output = (ROOT / args.output).resolve()
    training = output / "training"
    if args.force and training.exists():
        shutil.rmtree(training)
    os.environ.setdefault("DETECTRON2_DATASETS", str(ROOT / "datasets"))
    start = time.monotonic()
    train, val = map(str, args.world)
    run("datasets/prepare_ovshapes.py", "--train", train, "--val", val)
    if (training / "results.json").exists():
        print(f"\n{training} holds a finished training (--force trains anew)")
    else:
        run("train_net.py", "--config-file", CONFIG, "--resume", "OUTPUT_DIR", str(training), *args.opts)

    finished = json.loads((training / "results.json").read_text())
    results = {
        "method": "Mask2Former",
        "steps": finished["iteration"],
        "seconds": round(finished["seconds"], 1),
        **metrics_of(finished),
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(training, output / "predictions.png", num_images=args.images)
    print(f"\n{table(results)}\n")
    print(f"pictures  {output / 'predictions.png'}")
    print(f"figures   {output / 'results.json'}")
    print(f"weights   {training / 'model_final.pth'}")
    print(f"this run took {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
