"""Instance segmentation AP with pycocotools.

Differs from detectron2's COCOEvaluator where panoptic datasets need it: thing classes may be any subset of the
contiguous ids, annotations may come from the panoptic files alone, and no prediction at all scores 0.
"""

import contextlib
import io
import json
import logging
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ovseg_d2.evaluation.gather import check_complete, gather_records, required_output
from ovseg_d2.evaluation.panoptic_png import read_panoptic_png

logger = logging.getLogger(__name__)
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


class InstanceEvaluator(DatasetEvaluator):
    """Mask AP (``segm``), and box AP (``bbox``) if the predictions have boxes, in percent, with AP of each class.

    Args:
        dataset_name: registered dataset. Annotations are its ``json_file`` in COCO format or, without one, the thing
            segments of the images' ``pan_seg_file_name`` and ``segments_info``.
        output_folder: if given, predictions go to ``coco_instances_results.json`` in it.
        allow_missing: leave images without a prediction out of the score instead of refusing.
    """

    def __init__(
        self, *, dataset_name: str, output_folder: str | Path | None = None, allow_missing: bool = False
    ) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._output_folder = Path(output_folder) if output_folder else None
        self._allow_missing = allow_missing
        self._category_ids = {v: k for k, v in metadata.thing_dataset_id_to_contiguous_id.items()}
        self._class_names = _thing_names(list(metadata.thing_classes), sorted(self._category_ids))
        json_file = metadata.get("json_file", None)
        self._annotations = _load_coco(json_file) if json_file else None
        self._source = json_file or f"dataset {dataset_name!r}"
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        # (image, annotations, predictions) in COCO format; the first two only if there is no annotation file.
        self._images: dict[Hashable, tuple[dict | None, list[dict], list[dict]]] = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Takes ``image_id`` of each input and ``instances`` (masks (n, H, W), scores, classes) of each output."""
        for image, output in zip(inputs, outputs, strict=True):
            image_id = image["image_id"]
            instances: Instances = required_output(output, "instances", type(self).__name__)
            predictions = instances_to_coco(instances.to("cpu"), image_id=image_id, category_ids=self._category_ids)
            if self._annotations is None:
                description, annotations = self._derive_annotations(image)
            elif image_id not in self._annotations.imgs:
                raise ValueError(f"{self._source}: no image with id {image_id!r} ({image['file_name']})")
            else:
                description, annotations = self._annotations.imgs[image_id], []
            self._check_size(image["file_name"], description, instances.image_size)
            self._images[image_id] = (description if self._annotations is None else None, annotations, predictions)

    def evaluate(self) -> OrderedDict | None:
        """Scores on the main process, None on the others."""
        images = gather_records(self._images)
        if images is None:
            return None
        predictions = [p for _, _, part in images.values() for p in part]
        if self._output_folder:
            self._write_predictions(predictions)
        ground_truth = self._annotations
        if ground_truth is None:
            annotations = [a for _, part, _ in images.values() for a in part]
            ground_truth = _build_coco([image for image, _, _ in images.values()], self._categories(), annotations)
        check_complete(images, ground_truth.imgs, source=self._source, allow_missing=self._allow_missing)

        scores = OrderedDict(segm=self._score(ground_truth, predictions, list(images), "segm"))
        if predictions and all("bbox" in p for p in predictions):
            scores["bbox"] = self._score(ground_truth, predictions, list(images), "bbox")
        return scores

    def _score(self, ground_truth: COCO, predictions: list[dict], image_ids: list, kind: str) -> dict[str, float]:
        # COCO sorts detections into small, medium and large by ``area``, that of the kind which is scored.
        if kind == "segm":
            # One by one: for a list of more than 255, pycocotools 2.0.11 overflows with numpy 2.
            areas = [float(coco_mask.area(p["segmentation"])) for p in predictions]
        else:
            areas = [p["bbox"][2] * p["bbox"][3] for p in predictions]
        detections = [p | {"area": area, "iscrowd": 0} for p, area in zip(predictions, areas, strict=True)]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            detected = _build_coco(ground_truth.dataset["images"], ground_truth.dataset["categories"], detections)
            coco_eval = COCOeval(ground_truth, detected, kind)
            coco_eval.params.imgIds = image_ids
            coco_eval.params.catIds = sorted(set(ground_truth.cats) & set(self._category_ids.values()))
            coco_eval.evaluate()
            coco_eval.accumulate()
            coco_eval.summarize()
        # pycocotools says -1 where there is no ground truth.
        stats = [100 * value if value >= 0 else float("nan") for value in coco_eval.stats.tolist()]
        return dict(zip(METRICS, stats, strict=False)) | self._class_scores(coco_eval)

    def _class_scores(self, coco_eval: COCOeval) -> dict[str, float]:
        # (IoU thresholds, recalls, classes) for objects of all sizes and the most detections an image.
        precision = coco_eval.eval["precision"][:, :, :, 0, -1]
        names = {self._category_ids[k]: name for k, name in self._class_names.items()}
        scores = {}
        for k, category_id in enumerate(coco_eval.params.catIds):
            valid = precision[..., k][precision[..., k] > -1]
            scores[f"AP-{names[category_id]}"] = 100 * float(valid.mean()) if valid.size else float("nan")
        return scores

    def _derive_annotations(self, image: dict) -> tuple[dict, list[dict]]:
        """COCO image and annotations from the thing segments of a panoptic dataset dict."""
        if "pan_seg_file_name" not in image:
            raise ValueError(f"{image['file_name']}: instance AP needs json_file in the metadata or pan_seg_file_name")
        ids = read_panoptic_png(image["pan_seg_file_name"])
        things = [s for s in image["segments_info"] if s["category_id"] in self._category_ids]
        masks = ids == np.array([s["id"] for s in things]).reshape(-1, 1, 1)
        annotations = [
            {
                "image_id": image["image_id"],
                "category_id": self._category_ids[segment["category_id"]],
                "iscrowd": int(segment.get("iscrowd", 0)),
                "segmentation": rle,
                "area": int(mask.sum()),
                "bbox": coco_mask.toBbox(rle).tolist(),
            }
            for segment, mask, rle in zip(things, masks, encode_masks(masks), strict=True)
        ]
        return {"id": image["image_id"], "height": ids.shape[0], "width": ids.shape[1]}, annotations

    def _categories(self) -> list[dict]:
        return [{"id": self._category_ids[k], "name": name} for k, name in self._class_names.items()]

    def _check_size(self, file_name: str, description: dict, size: tuple[int, int]) -> None:
        annotated = (description["height"], description["width"])
        if annotated != tuple(size):
            raise ValueError(f"{file_name}: the prediction is {tuple(size)}, {self._source} says {annotated} (H, W)")

    def _write_predictions(self, predictions: list[dict]) -> None:
        self._output_folder.mkdir(parents=True, exist_ok=True)
        path = self._output_folder / "coco_instances_results.json"
        path.write_text(json.dumps(predictions))
        logger.info("%d instance predictions: %s", len(predictions), path)


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """COCO run-length codes of masks (n, H, W) bool, with ``counts`` as text so that JSON takes them."""
    rles = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in rles]


def instances_to_coco(
    instances: Instances, *, image_id: Hashable, category_ids: dict[int, int]
) -> list[dict[str, Any]]:
    """Results in COCO format of one image's instances on the CPU.

    Args:
        instances: ``pred_masks`` (n, H, W), ``scores`` (n,), ``pred_classes`` (n,), optionally ``pred_boxes`` (n, 4).
        image_id: id of the image in the annotation file.
        category_ids: contiguous class -> category id of the annotation file.

    Raises:
        ValueError: a predicted class is not in ``category_ids``.
    """
    classes = instances.pred_classes.tolist()
    unknown = sorted(set(classes) - category_ids.keys())
    if unknown:
        raise ValueError(f"image {image_id!r}: predicted classes {unknown} are not thing classes of the dataset")
    results = [
        {"image_id": image_id, "category_id": category_ids[k], "score": score, "segmentation": rle}
        for k, score, rle in zip(
            classes, instances.scores.tolist(), encode_masks(instances.pred_masks.numpy() > 0), strict=True
        )
    ]
    if instances.has("pred_boxes"):
        boxes = instances.pred_boxes.tensor.clone()
        boxes[:, 2:] -= boxes[:, :2]  # x0, y0, x1, y1 -> x, y, width, height
        for result, box in zip(results, boxes.tolist(), strict=True):
            result["bbox"] = box
    return results


def _thing_names(names: list[str], contiguous_ids: list[int]) -> dict[int, str]:
    """Name of each contiguous thing id: ``thing_classes`` lists the things only or, in some datasets, all classes."""
    if len(names) == len(contiguous_ids):
        return dict(zip(contiguous_ids, names, strict=True))
    return {k: names[k] for k in contiguous_ids}


def _load_coco(path: str | Path) -> COCO:
    if not Path(path).is_file():
        raise FileNotFoundError(f"instance annotations not found: {path}")
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def _build_coco(images: list[dict], categories: list[dict], annotations: list[dict]) -> COCO:
    coco = COCO()
    numbered = [a | {"id": i} for i, a in enumerate(annotations, 1)]
    coco.dataset = {"images": images, "categories": categories, "annotations": numbered}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
