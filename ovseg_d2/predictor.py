"""From a config and weights to results and pictures: what the demo and notebooks use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.transforms import apply_augmentations

import ovseg_d2.data  # noqa: F401  registers the datasets whose metadata names the classes
import ovseg_d2.modeling  # noqa: F401  registers the models
from ovseg_d2.data.augmentation import build_test_augmentations
from ovseg_d2.data.check import has_closed_vocabulary
from ovseg_d2.data.vocabulary import load_vocabulary, vocabulary_from_metadata, vocabulary_from_names
from ovseg_d2.engine import load_model
from ovseg_d2.engine.load_config import load_config
from ovseg_d2.engine.setup import available_device
from ovseg_d2.evaluation.instance import instances_to_coco
from ovseg_d2.structures import Vocabulary
from ovseg_d2.visualization import ResultDrawer

Results = dict[str, Any]
VocabularyLike = Vocabulary | str | Sequence[str]


class OpenVocabPredictor:
    """Segments single images.

    Example::

        predictor = OpenVocabPredictor.from_config_file("configs/x.yaml", weights="model.pth", tasks=["panoptic"])
        results = predictor(image)  # (H, W, 3) uint8 RGB
        picture = predictor.draw(image, results, "panoptic")
        predictor.set_vocabulary("red star, blue ring, grass:stuff")  # open-vocabulary models
    """

    def __init__(self, cfg: CfgNode, *, vocabulary: VocabularyLike | None = None, score_threshold: float = 0.5) -> None:
        """
        Args:
            cfg: MODEL.OVSEG.TEST.TASKS says which results are made, MODEL.WEIGHTS where the weights are.
            vocabulary: classes to look for, in a form that :meth:`set_vocabulary` takes; by default those of
                DATASETS.TEST, else of DATASETS.TRAIN.
            score_threshold: instances that score less are dropped.

        Raises:
            ValueError: the config names no dataset with class names, and no vocabulary is given; or a closed-vocabulary
                model gets other classes than it was trained with.
        """
        self.tasks = tuple(cfg.MODEL.OVSEG.TEST.TASKS)
        self.score_threshold = score_threshold
        self._input_format = cfg.INPUT.FORMAT
        self._augmentations = build_test_augmentations(cfg)
        # Classes that a closed vocabulary may only rename.
        self._num_fixed_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES if has_closed_vocabulary(cfg) else None
        self._architecture = cfg.MODEL.META_ARCHITECTURE
        if vocabulary is None:
            metadata = _dataset_metadata(cfg)
            self.vocabulary = vocabulary_from_metadata(metadata)
            self.drawer = ResultDrawer.from_metadata(metadata)
        else:
            self.set_vocabulary(vocabulary)
        self.model = load_model(cfg)

    @classmethod
    def from_config_file(
        cls,
        config_file: str | Path,
        *,
        weights: str | Path | None = None,
        tasks: Sequence[str] | None = None,
        opts: Sequence[str] = (),
        **kwargs: Any,
    ) -> OpenVocabPredictor:
        """Builds from a YAML file.

        Args:
            config_file: the config.
            weights: overrides MODEL.WEIGHTS.
            tasks: overrides MODEL.OVSEG.TEST.TASKS.
            opts: further ``KEY VALUE`` pairs that override the file.
            kwargs: arguments of the constructor.
        """
        overrides = list(opts)
        if weights is not None:
            overrides += ["MODEL.WEIGHTS", str(weights)]
        if tasks is not None:
            overrides += ["MODEL.OVSEG.TEST.TASKS", str(list(tasks))]
        cfg = load_config(config_file, overrides)
        cfg.MODEL.DEVICE = available_device(cfg.MODEL.DEVICE)
        return cls(cfg, **kwargs)

    def set_vocabulary(self, vocabulary: VocabularyLike) -> None:
        """Look for other classes from now on. Nothing is computed anew but the text embeddings, at the next image.

        Args:
            vocabulary: class names, each with synonyms after commas and ``:stuff`` behind them if it is no countable
                object; all of them in one string between commas; the name of a registered dataset (whose colours are
                used too); a ``.txt`` or ``.json`` file; or a :class:`Vocabulary`.

        Raises:
            ValueError: no class, an empty or doubled name; or a closed-vocabulary model and another number of classes.
            FileNotFoundError: a file that does not exist.
        """
        drawer = None
        if isinstance(vocabulary, str):
            if vocabulary in DatasetCatalog.list():
                drawer = ResultDrawer.from_metadata(MetadataCatalog.get(vocabulary))
            vocabulary = load_vocabulary(vocabulary)
        elif not isinstance(vocabulary, Vocabulary):
            vocabulary = vocabulary_from_names(vocabulary)
        if self._num_fixed_classes not in (None, len(vocabulary)):
            raise ValueError(
                f"{self._architecture} has a closed vocabulary: the {self._num_fixed_classes} classes of its training "
                f"can be renamed, but {len(vocabulary)} classes are given; expected a model with an open vocabulary"
            )
        self.vocabulary = vocabulary
        self.drawer = drawer or ResultDrawer(class_names=vocabulary.names)

    def __call__(self, image: np.ndarray) -> Results:
        """Results of one image (H, W, 3) RGB uint8, at its size: ``sem_seg``, ``panoptic_seg``, ``instances``."""
        return self.predict([image])[0]

    @torch.no_grad()
    def predict(self, images: Sequence[np.ndarray]) -> list[Results]:
        """Results of several images in one batch; the images' sizes may differ."""
        results = self.model([self._model_input(image) for image in images])
        for result in results:
            if "instances" in result:
                instances = result["instances"]
                result["instances"] = instances[instances.scores >= self.score_threshold]
        return results

    def draw(self, image: np.ndarray, results: Results, task: str, *, scale: int = 1) -> np.ndarray:
        """Picture (scale * H, scale * W, 3) RGB uint8 of one task's result on the image (H, W, 3)."""
        return self.drawer.draw(image, results, task, scale=scale)

    def to_json(self, results: Results, task: str) -> tuple[dict[str, Any], np.ndarray | None]:
        """One task's result as plain data.

        Returns:
            A dict that JSON takes. ``category_id`` is the index of the class in the vocabulary. Semantic: ``classes``
            with their ``area``. Panoptic: ``segments_info``. Instance: ``instances`` as COCO results (boxes as x, y,
            width, height; masks as run-length codes).
            And the map that belongs to it: class indices (H, W) for semantic, segment ids (H, W) for panoptic.
        """
        names = self.vocabulary.names
        if task == "semantic":
            labels = results["sem_seg"].argmax(dim=0).cpu().numpy()
            areas = np.bincount(labels.ravel(), minlength=len(names))
            present = np.flatnonzero(areas).tolist()
            classes = [{"category_id": k, "name": names[k], "area": int(areas[k])} for k in present]
            return {"task": task, "classes": classes}, labels
        if task == "panoptic":
            ids, segments_info = results["panoptic_seg"]
            ids = ids.cpu().numpy()
            segments = [
                {
                    "id": segment["id"],
                    "category_id": segment["category_id"],
                    "name": names[segment["category_id"]],
                    "isthing": bool(segment["isthing"]),
                    "area": int((ids == segment["id"]).sum()),
                }
                for segment in segments_info
            ]
            return {"task": task, "segments_info": segments}, ids
        identity = {k: k for k in range(len(names))}
        instances = instances_to_coco(results["instances"].to("cpu"), image_id=0, category_ids=identity)
        for instance in instances:
            del instance["image_id"]
            instance["name"] = names[instance["category_id"]]
        return {"task": task, "instances": instances}, None

    def _model_input(self, image: np.ndarray) -> dict[str, Any]:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"image has shape {image.shape} and type {image.dtype}, expected (H, W, 3) uint8")
        height, width = image.shape[:2]
        resized, _ = apply_augmentations(self._augmentations, image)
        if self._input_format == "BGR":
            resized = resized[:, :, ::-1]
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width, "vocabulary": self.vocabulary}


def _dataset_metadata(cfg: CfgNode) -> Any:
    """Metadata of the first dataset in the config that has class names."""
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        metadata = MetadataCatalog.get(name)
        if hasattr(metadata, "stuff_classes") or hasattr(metadata, "thing_classes"):
            return metadata
    raise ValueError(
        f"no class names: DATASETS.TEST {list(cfg.DATASETS.TEST)} and DATASETS.TRAIN {list(cfg.DATASETS.TRAIN)} "
        "name no registered dataset with classes, and no vocabulary is given"
    )
