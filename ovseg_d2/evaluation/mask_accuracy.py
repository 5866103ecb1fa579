"""How often perfect masks get their class (MaskCLIP++, arXiv 2412.11464; the mask accuracy of its model zoo)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from torch import Tensor

from ovseg_d2.data.vocabulary import vocabulary_from_metadata
from ovseg_d2.evaluation.class_scores import mean, ratio, seen_means, seen_split
from ovseg_d2.evaluation.gather import gather_records, required_output
from ovseg_d2.structures import Vocabulary

Array = np.ndarray


class MaskAccuracyEvaluator(DatasetEvaluator):
    """Shares of rightly classified masks in percent.

    ``MaskAcc`` is the mean over the classes that occur, with ``MaskAcc_seen``, ``MaskAcc_unseen`` and their harmonic
    mean ``hMaskAcc`` if there is a split; ``MaskAcc_overall`` is that of all masks alike. ``masks`` is their number.
    ``empty_masks`` of them have no pixel at the size of the image that the model gets; they count like the others.
    """

    def __init__(self, *, dataset_name: str, trained_vocabulary: Vocabulary | None = None) -> None:
        """
        Args:
            dataset_name: a registered dataset with K classes.
            trained_vocabulary: classes of the training data; what is not among them is unseen, unless the dataset has
                a split of its own.
        """
        self._vocabulary = vocabulary_from_metadata(MetadataCatalog.get(dataset_name))
        self._is_seen = seen_split(self._vocabulary, trained_vocabulary)
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        # Per image: classes (Q,) int64, and bools whether they were found, and whether the mask is empty.
        self._images: dict[Hashable, tuple[Array, Array, Array]] = {}

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Takes ``proposal_classes`` (Q,), ``proposals`` (Q, H, W) of inputs, ``mask_class_probs`` (Q, K) of outputs.

        Raises:
            ValueError: no masks came with an input, or the output is not of as many masks and classes.
        """
        for image, output in zip(inputs, outputs, strict=True):
            if "proposal_classes" not in image:
                raise ValueError(
                    f"{image['file_name']}: no masks of its annotation came with it; mask accuracy is of "
                    "MODEL.OVSEG.PROPOSALS.NAME GroundTruthProposals"
                )
            probs: Tensor = required_output(output, "mask_class_probs", type(self).__name__)
            class_ids = image["proposal_classes"].cpu().numpy()
            expected = (len(class_ids), len(self._vocabulary))
            if tuple(probs.shape) != expected:
                raise ValueError(
                    f"{image['file_name']}: mask_class_probs is {tuple(probs.shape)}, expected {expected}, a row a "
                    "mask and a column a class of the dataset"
                )
            found = probs.argmax(dim=1).cpu().numpy() == class_ids
            is_empty = ~image["proposals"].flatten(1).any(dim=1).cpu().numpy()
            self._images[image["file_name"]] = (class_ids, found, is_empty)

    def evaluate(self) -> OrderedDict | None:
        """Scores on the main process, None on the others."""
        images = gather_records(self._images)
        if images is None:
            return None
        nothing = (np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0, bool))
        class_ids, found, is_empty = (np.concatenate(column) for column in zip(nothing, *images.values(), strict=True))
        scores = self._scores(class_ids, found)
        return OrderedDict(mask_accuracy={**scores, "masks": len(class_ids), "empty_masks": int(is_empty.sum())})

    def _scores(self, class_ids: Array, found: Array) -> dict[str, float]:
        num_classes = len(self._vocabulary)
        correct = np.bincount(class_ids[found], minlength=num_classes).astype(float)
        accuracy = ratio(correct, np.bincount(class_ids, minlength=num_classes))
        scores = {"MaskAcc": mean(accuracy), "MaskAcc_overall": float(ratio(correct.sum(), len(class_ids)))}
        if self._is_seen is not None:
            names = ("MaskAcc_seen", "MaskAcc_unseen", "hMaskAcc")
            scores |= dict(zip(names, seen_means(accuracy, self._is_seen), strict=True))
        scores |= {f"MaskAcc-{name}": x for name, x in zip(self._vocabulary.names, accuracy.tolist(), strict=True)}
        return {key: 100 * value for key, value in scores.items()}
