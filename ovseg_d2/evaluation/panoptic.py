"""Panoptic evaluation of detectron2 models on datasets in COCO-panoptic layout."""

import json
import logging
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from ovseg_d2.evaluation.gather import check_complete, gather_records, required_output
from ovseg_d2.evaluation.panoptic_png import read_panoptic_png, write_panoptic_png
from ovseg_d2.evaluation.panoptic_quality import PanopticQuality

logger = logging.getLogger(__name__)


class PanopticEvaluator(DatasetEvaluator):
    """PQ, SQ and RQ in percent, over all classes, things and stuff, and PQ of each class.

    Matches are counted while images are processed; predictions are written only if somebody wants them.

    Args:
        dataset_name: registered dataset whose metadata has ``panoptic_json``, ``panoptic_root`` and the id tables.
        output_folder: if given, predictions go to ``panoptic_predictions.json`` and ``panoptic_predictions/*.png`` in
            it, in the form that official tools and servers take.
        allow_missing: leave images without a prediction out of the score instead of refusing.
    """

    def __init__(
        self, *, dataset_name: str, output_folder: str | Path | None = None, allow_missing: bool = False
    ) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        self._json_file = Path(metadata.panoptic_json)
        self._gt_root = Path(metadata.panoptic_root)
        self._output_folder = Path(output_folder) if output_folder else None
        self._allow_missing = allow_missing
        self._thing_ids = {v: k for k, v in metadata.thing_dataset_id_to_contiguous_id.items()}
        self._stuff_ids = {v: k for k, v in metadata.stuff_dataset_id_to_contiguous_id.items()}
        if not self._json_file.is_file():
            raise FileNotFoundError(f"panoptic annotations of dataset {dataset_name!r} not found: {self._json_file}")
        self._ground_truth = json.loads(self._json_file.read_text())
        self._annotations = {a["image_id"]: a for a in self._ground_truth["annotations"]}
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._quality = PanopticQuality(categories=self._ground_truth["categories"])
        self._predictions: dict[Hashable, dict[str, Any]] = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Takes ``image_id``, ``file_name`` of inputs and ``panoptic_seg`` (ids (H, W), segments_info) of outputs."""
        for image, output in zip(inputs, outputs, strict=True):
            ids, segments_info = required_output(output, "panoptic_seg", type(self).__name__)
            ids = ids.cpu().numpy()
            segments = [self._to_dataset_category(segment) for segment in segments_info]
            self._process_image(image["image_id"], image["file_name"], ids, segments)

    def _process_image(self, image_id: Hashable, file_name: str, ids: np.ndarray, segments: list[dict]) -> None:
        if image_id not in self._annotations:
            raise ValueError(f"{self._json_file}: no annotation for image {image_id!r} ({file_name})")
        annotation = self._annotations[image_id]
        self._quality.update(
            image_id,
            gt_ids=read_panoptic_png(self._gt_root / annotation["file_name"]),
            gt_segments=annotation["segments_info"],
            pred_ids=ids,
            pred_segments=segments,
            name=file_name,
        )
        png = Path(annotation["file_name"]).with_suffix(".png")
        self._predictions[image_id] = {"image_id": image_id, "file_name": str(png), "segments_info": segments}
        if self._output_folder:
            path = self._output_folder / "panoptic_predictions" / png
            path.parent.mkdir(parents=True, exist_ok=True)
            write_panoptic_png(path, ids)

    def _to_dataset_category(self, segment: dict) -> dict[str, int]:
        """Segment with the category id of the annotation file instead of the model's contiguous one."""
        table = self._thing_ids if segment["isthing"] else self._stuff_ids
        if segment["category_id"] not in table:
            kind = "thing" if segment["isthing"] else "stuff"
            raise ValueError(f"predicted class {segment['category_id']} is not a {kind} class of {self._json_file}")
        return {"id": int(segment["id"]), "category_id": table[segment["category_id"]]}

    def evaluate(self) -> OrderedDict | None:
        """Scores on the main process, None on the others."""
        images = gather_records(self._quality.images)
        predictions = gather_records(self._predictions)
        if images is None:
            return None
        check_complete(images, self._annotations, source=str(self._json_file), allow_missing=self._allow_missing)
        if self._output_folder:
            self._write_predictions(list(predictions.values()))
        quality = PanopticQuality(categories=self._ground_truth["categories"])
        quality.images = images
        return OrderedDict(panoptic_seg=self._percent(quality.result()))

    def _percent(self, result: dict[str, dict]) -> dict[str, float]:
        scores = {}
        for group, suffix in (("All", ""), ("Things", "_th"), ("Stuff", "_st")):
            for metric in ("pq", "sq", "rq"):
                scores[metric.upper() + suffix] = 100 * result[group][metric]
        for category in self._ground_truth["categories"]:
            scores[f"PQ-{category['name']}"] = 100 * result["per_class"][category["id"]]["pq"]
        return scores

    def _write_predictions(self, annotations: list[dict]) -> None:
        path = self._output_folder / "panoptic_predictions.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        tables = {key: self._ground_truth[key] for key in ("images", "categories")}
        path.write_text(json.dumps(tables | {"annotations": annotations}))
        logger.info("%d panoptic predictions: %s", len(annotations), path)
