"""Semantic segmentation metrics, with the seen/unseen split of zero-shot benchmarks."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from ovseg_d2.data.image_io import read_image
from ovseg_d2.data.label_files import labelled_pixels
from ovseg_d2.data.label_map import class_of_label
from ovseg_d2.data.vocabulary import vocabulary_from_metadata
from ovseg_d2.evaluation.class_scores import harmonic_mean, mean, ratio, seen_means, seen_split
from ovseg_d2.evaluation.gather import gather_records, required_output
from ovseg_d2.evaluation.panoptic_png import read_panoptic_png
from ovseg_d2.structures import Vocabulary


def sem_seg_scores(
    confusion: np.ndarray,
    *,
    class_names: Sequence[str],
    class_is_seen: Sequence[bool] | None = None,
    evaluation_set: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, float]:
    """Scores in percent.

    A class that neither the ground truth nor a prediction contains is NaN and left out of means; one that is only
    predicted has IoU 0 and no accuracy. (ZSSeg shows the latter's IoU as NaN, but counts it as 0 in its means too.)

    Args:
        confusion: (K, K) pixel counts, [ground truth, prediction]; ignored pixels are not in it. More columns are of
            predictions that are none of the classes.
        class_names: K names.
        class_is_seen: K flags of :func:`seen_split`; adds ``mIoU_seen``, ``mIoU_unseen``, harmonic mean ``hIoU``.
        evaluation_set: class indices of named sets; adds the scores of :func:`class_set_scores`.
    """
    confusion = confusion.astype(np.float64)
    correct, gt_area = np.diag(confusion), confusion.sum(axis=1)
    pred_area = confusion.sum(axis=0)[: len(confusion)]
    iou = ratio(correct, gt_area + pred_area - correct)
    accuracy = ratio(correct, gt_area)
    frequency = ratio(gt_area, gt_area.sum())
    scores = {
        "mIoU": mean(iou),
        "fwIoU": float(np.nansum(frequency * iou)) if gt_area.any() else float("nan"),
        "mACC": mean(accuracy),
        "pACC": float(ratio(correct.sum(), gt_area.sum())),
    }
    if class_is_seen is not None:
        scores |= dict(zip(("mIoU_seen", "mIoU_unseen", "hIoU"), seen_means(iou, class_is_seen), strict=True))
    for name, class_ids in (evaluation_set or {}).items():
        scores |= class_set_scores(name, class_ids, iou=iou, correct=correct, gt_area=gt_area)
    scores |= {f"IoU-{name}": value for name, value in zip(class_names, iou.tolist(), strict=True)}
    scores |= {f"ACC-{name}": value for name, value in zip(class_names, accuracy.tolist(), strict=True)}
    return {key: 100 * value for key, value in scores.items()}


def class_set_scores(
    name: str, class_ids: Sequence[int], *, iou: np.ndarray, correct: np.ndarray, gt_area: np.ndarray
) -> dict[str, float]:
    """Scores in 0..1 of a set of classes and of all the others, under the names of ZSSeg and FreeSeg.

    ``mIoU-<set>``, ``pAcc-<set>``, the same as ``mIoU-un<set>``, ``pAcc-un<set>`` of the complement, and the harmonic
    mean of both mIoU, ``hIoU-<set>``. With the seen classes as ``base``, ``hIoU-base`` is ``hIoU``.

    Args:
        class_ids: the set, indices in [0, K).
        iou: (K,) IoU, NaN for classes that are nowhere.
        correct: (K,) rightly predicted pixels.
        gt_area: (K,) pixels of the ground truth.

    Raises:
        ValueError: an index that is no class.
    """
    outside = [i for i in class_ids if not 0 <= i < len(iou)]
    if outside:
        raise ValueError(f"evaluation_set {name!r} has class {outside[0]}; expected 0..{len(iou) - 1}")
    inside = np.zeros(len(iou), bool)
    inside[list(class_ids)] = True
    scores = {}
    for prefix, chosen in (("", inside), ("un", ~inside)):
        scores[f"mIoU-{prefix}{name}"] = mean(iou[chosen])
        scores[f"pAcc-{prefix}{name}"] = float(ratio(correct[chosen].sum(), gt_area[chosen].sum()))
    return scores | {f"hIoU-{name}": harmonic_mean(scores[f"mIoU-{name}"], scores[f"mIoU-un{name}"])}


class SemSegEvaluator(DatasetEvaluator):
    """mIoU, frequency-weighted IoU, mean and pixel accuracy; seen, unseen and harmonic mIoU if there is a split.

    Ground truth is the input's ``sem_seg_file_name`` (PNG or TIFF, 8 or 16 bit) or, without one, is derived from
    ``pan_seg_file_name`` and ``segments_info``.

    Args:
        dataset_name: registered dataset; its metadata has ``stuff_classes`` and maybe a split, ``class_is_seen``, and
            ``evaluation_set``. All K classes are scored; with ``background_label`` B the first B and "background",
            which label B is, and every prediction of another class (PAS-20b); there is no split then.
        ignore_label: used where the metadata has no ``ignore_label``.
        trained_vocabulary: classes of the training data; in a dataset without a split, what is not among them is
            unseen.
    """

    #: The name of the results.
    task = "sem_seg"

    def __init__(
        self, *, dataset_name: str, ignore_label: int = 255, trained_vocabulary: Vocabulary | None = None
    ) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        self._num_entries = len(metadata.stuff_classes)
        self._class_names = list(metadata.stuff_classes)
        self._class_is_seen = seen_split(vocabulary_from_metadata(metadata), trained_vocabulary)
        self._evaluation_set = metadata.get("evaluation_set", None)
        self._class_of_label = class_of_label(metadata)
        background = metadata.get("background_label", None)
        if background is not None:
            self._class_names[background:] = ["background"]
            self._class_is_seen = self._class_of_label = None
        self._ignore_label = metadata.get("ignore_label", ignore_label)
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        # Per image the non-zero cells of its confusion matrix: small, and an image seen twice counts once.
        self._images: dict[Hashable, tuple[np.ndarray, np.ndarray]] = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Takes ``file_name`` and the ground truth's file of inputs, and of outputs what :meth:`predicted` needs."""
        num_classes = len(self._class_names)
        for image, output in zip(inputs, outputs, strict=True):
            gt, source = load_semantic_ground_truth(
                image, ignore_label=self._ignore_label, class_of_label=self._class_of_label
            )
            valid = _labelled_pixels(gt, num_classes, self._ignore_label, source)
            pred = self.predicted(image, output, gt, source)
            gt, pred = gt[valid], pred[valid]
            counts = np.bincount(gt * (num_classes + 1) + pred, minlength=num_classes * (num_classes + 1))
            cells = np.flatnonzero(counts)
            self._images[image["file_name"]] = (cells, counts[cells])

    def predicted(self, image: dict, output: dict, gt: np.ndarray, source: str) -> np.ndarray:
        """Scored classes (H, W) int64 in [0, K], K for none, from ``sem_seg`` scores of an output.

        Args:
            image: the input.
            gt: (H, W) int64, the ground truth.
            source: where it is from, for errors.

        Raises:
            ValueError: the output has other classes, or another size.
        """
        scores: torch.Tensor = required_output(output, "sem_seg", type(self).__name__)
        if len(scores) != self._num_entries:
            raise ValueError(
                f"{image['file_name']}: sem_seg has {len(scores)} classes, the dataset {self._num_entries}"
            )
        require_size(scores, gt, source)
        # Where classes count as background, that is the last one, and they are from there on.
        return scores.argmax(dim=0).clamp(max=len(self._class_names) - 1).cpu().numpy()

    def evaluate(self) -> OrderedDict | None:
        """Scores on the main process, None on the others."""
        images = gather_records(self._images)
        if images is None:
            return None
        num_classes = len(self._class_names)
        confusion = np.zeros(num_classes * (num_classes + 1), dtype=np.int64)
        for cells, counts in images.values():
            confusion[cells] += counts
        scores = sem_seg_scores(
            confusion.reshape(num_classes, num_classes + 1),
            class_names=self._class_names,
            class_is_seen=self._class_is_seen,
            evaluation_set=self._evaluation_set,
        )
        return OrderedDict({self.task: scores})


def require_size(maps: torch.Tensor, gt: np.ndarray, source: str) -> None:
    """Maps (C, H, W) of a prediction must be of the size of the ground truth (H, W), which is from ``source``.

    Raises:
        ValueError: they are not.
    """
    size = tuple(maps.shape[1:])
    if gt.shape != size:
        raise ValueError(f"{source}: ground truth is {gt.shape}, the prediction {size} (H, W)")


def load_semantic_ground_truth(
    image: dict, *, ignore_label: int, class_of_label: np.ndarray | None = None
) -> tuple[np.ndarray, str]:
    """Class ids (H, W) int64 of a dataset dict, and the file they come from.

    ``class_of_label`` is the table of :func:`ovseg_d2.data.label_map.class_of_label` of the dataset.

    Raises:
        FileNotFoundError: there is neither a semantic nor a panoptic file.
        ValueError: the semantic file has more than one channel, or a label that the table lacks.
    """
    path = image.get("sem_seg_file_name")
    if path is not None and Path(path).is_file():
        gt = read_image(str(path)).astype(np.int64)
        if gt.ndim != 2:
            raise ValueError(f"{path}: semantic ground truth has one channel, found shape {gt.shape}")
        if class_of_label is not None:
            gt = _classes(gt, class_of_label, ignore_label, str(path))
        return gt, str(path)
    if "pan_seg_file_name" not in image:
        raise FileNotFoundError(f"semantic ground truth of {image['file_name']} not found: {path or 'none registered'}")
    path = image["pan_seg_file_name"]
    ids = read_panoptic_png(path)
    gt = np.full(ids.shape, ignore_label, dtype=np.int64)
    for segment in image["segments_info"]:
        gt[ids == segment["id"]] = segment["category_id"]
    return gt, str(path)


def _classes(labels: np.ndarray, class_of_label: np.ndarray, ignore_label: int, source: str) -> np.ndarray:
    valid = _labelled_pixels(labels, len(class_of_label), ignore_label, source)
    classes = np.full(labels.shape, ignore_label, np.int64)
    classes[valid] = np.where(class_of_label < 0, ignore_label, class_of_label)[labels[valid]]
    return classes


def _labelled_pixels(labels: np.ndarray, num_labels: int, ignore_label: int, source: str) -> np.ndarray:
    try:
        return labelled_pixels(labels, num_labels, ignore_label)
    except ValueError as error:
        raise ValueError(f"{source} has {error}") from None
