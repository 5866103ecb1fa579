"""What all segmentation models share: input, vocabulary, output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from ovseg_d2.data.vocabulary import training_vocabulary, vocabulary_from_metadata
from ovseg_d2.modeling.inference.mask_inference import MaskInference
from ovseg_d2.structures import ImageBatch, MaskProposals, SegmentationTargets, Vocabulary, pad_masks


class OpenVocabSegmentor(nn.Module, ABC):
    """Owns ``forward``; a method is ``__init__``, ``from_config``, ``losses`` and ``predict``."""

    def __init__(
        self,
        *,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int,
        inference: MaskInference,
        vocabulary: Vocabulary | None,
    ) -> None:
        """
        Args:
            pixel_mean, pixel_std: of the three channels, on the scale 0 to 255.
            size_divisibility: images are padded to multiples of it; 0 for no more than a common size.
            vocabulary: of the training data; used where an input names neither vocabulary nor dataset.
        """
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.size_divisibility = size_divisibility
        self.inference = inference
        self.vocabulary = vocabulary

    @staticmethod
    def shared_from_config(cfg: CfgNode) -> dict[str, Any]:
        """The constructor's arguments that all methods read from the same keys."""
        return {
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "size_divisibility": cfg.MODEL.OVSEG.SIZE_DIVISIBILITY,
            "inference": MaskInference.from_config(cfg),
            "vocabulary": training_vocabulary(cfg.DATASETS.TRAIN),
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def train(self, mode: bool = True) -> OpenVocabSegmentor:
        """As in PyTorch, but modules whose parameters are all frozen stay as in evaluation."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if module is not self and parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
        return self

    @abstractmethod
    def losses(
        self, images: ImageBatch, targets: Sequence[SegmentationTargets], vocabulary: Vocabulary | None
    ) -> dict[str, Tensor]:
        """Weighted scalar losses by name. For empty targets too, they are connected to every trainable parameter.

        Args:
            vocabulary: whose classes the targets are; None if nothing names them.
        """

    @abstractmethod
    def predict(self, images: ImageBatch, vocabulary: Vocabulary) -> MaskProposals:
        """Masks (N, Q, h, w) with class logits or probabilities (N, Q, K + 1) for the K classes of ``vocabulary``."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """
        Args:
            batched_inputs: detectron2's dicts. ``image`` (3, H, W), 0 to 255, in ``INPUT.FORMAT``; ``height`` and
                ``width`` of the results (default: the image's); in training ``instances`` with ``gt_classes`` and
                ``gt_masks``; optionally ``vocabulary`` (a :class:`Vocabulary`) or, in evaluation, ``dataset_name``.

        Returns:
            In training the weighted losses by name. In evaluation one dict an image: ``sem_seg`` (K, H, W),
            ``panoptic_seg`` (ids (H, W) int32, segments), ``instances``, according to ``MODEL.OVSEG.TEST.TASKS``.
        """
        if self.training:
            images = self.preprocess(batched_inputs)
            targets = self.targets(batched_inputs, images.padded_size)
            return self.losses(images, targets, self.training_vocabulary(batched_inputs))

        # One vocabulary at a time: images of one batch can come from several datasets.
        groups: dict[Vocabulary, list[int]] = {}
        for i, x in enumerate(batched_inputs):
            groups.setdefault(self.input_vocabulary(x), []).append(i)
        results: list[dict[str, Any]] = [{} for _ in batched_inputs]
        for vocabulary, indices in groups.items():
            group = [batched_inputs[i] for i in indices]
            for i, result in zip(indices, self.infer(self.preprocess(group), group, vocabulary), strict=True):
                results[i] = result
        return results

    def infer(
        self, images: ImageBatch, batched_inputs: Sequence[dict[str, Any]], vocabulary: Vocabulary
    ) -> list[dict[str, Any]]:
        """The results of images of one vocabulary, a dict each; see :meth:`forward`."""
        return self.results(self.predict(images, vocabulary), images, batched_inputs, vocabulary, self.inference)

    def results(
        self,
        proposals: MaskProposals,
        images: ImageBatch,
        batched_inputs: Sequence[dict[str, Any]],
        vocabulary: Vocabulary,
        inference: MaskInference,
    ) -> list[dict[str, Any]]:
        """What :meth:`predict` gives, in detectron2's form."""
        class_probs = proposals.class_probs
        if class_probs is None:
            class_probs = proposals.class_logits.float().softmax(-1)
        is_thing = torch.tensor(vocabulary.is_thing)
        results = []
        for row, (x, image_size) in enumerate(zip(batched_inputs, images.image_sizes, strict=True)):
            output_size = (x.get("height", image_size[0]), x.get("width", image_size[1]))
            results.append(
                inference(
                    class_probs[row],
                    proposals.mask_logits[row],
                    is_thing=is_thing,
                    padded_size=images.padded_size,
                    image_size=image_size,
                    output_size=output_size,
                )
            )
        return results

    def preprocess(self, batched_inputs: Sequence[dict[str, Any]]) -> ImageBatch:
        """Normalise, then pad with zeros (the mean colour) at the right and the bottom."""
        tensors = [(x["image"].to(self.device) - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        batch = ImageList.from_tensors(tensors, self.size_divisibility)
        size = (batch.tensor.shape[-2], batch.tensor.shape[-1])
        has_masks = all("proposals" in x for x in batched_inputs)
        return ImageBatch(
            tensor=batch.tensor,
            image_sizes=[(int(h), int(w)) for h, w in batch.image_sizes],
            image_ids=[x.get("image_id", i) for i, x in enumerate(batched_inputs)],
            dataset_names=[x.get("dataset_name") for x in batched_inputs],
            proposal_masks=[pad_masks(x["proposals"].to(self.device), size) for x in batched_inputs]
            if has_masks
            else None,
        )

    def targets(
        self, batched_inputs: Sequence[dict[str, Any]], padded_size: tuple[int, int]
    ) -> list[SegmentationTargets]:
        """Ground truth of each image, its masks padded to the batch's size.

        Raises:
            ValueError: an input has no ``instances``.
        """
        targets = []
        for x in batched_inputs:
            if "instances" not in x:
                raise ValueError(
                    f"{x.get('file_name', 'a training input')}: no 'instances' among {sorted(x)}; training needs masks"
                )
            instances: Instances = x["instances"].to(self.device)
            masks = getattr(instances.gt_masks, "tensor", instances.gt_masks)
            targets.append(SegmentationTargets(instances.gt_classes, pad_masks(masks, padded_size)))
        return targets

    def input_vocabulary(self, x: dict[str, Any]) -> Vocabulary:
        """The vocabulary that an input brings, else its dataset's, else that of the training data.

        Raises:
            ValueError: there is none.
        """
        if "vocabulary" in x:
            return x["vocabulary"]
        if "dataset_name" in x:
            return vocabulary_from_metadata(MetadataCatalog.get(x["dataset_name"]))
        return self.required(self.vocabulary, x.get("file_name", "an input"))

    def training_vocabulary(self, batched_inputs: Sequence[dict[str, Any]]) -> Vocabulary | None:
        """The one vocabulary that the inputs bring, else that of the training data.

        Raises:
            ValueError: they bring different ones.
        """
        brought = {x.get("vocabulary", self.vocabulary) for x in batched_inputs}
        if len(brought) > 1:
            raise ValueError(
                f"a training batch has inputs with {len(brought)} different vocabularies; expected one, which the "
                "class ids of all targets count in"
            )
        return next(iter(brought))

    @staticmethod
    def required(vocabulary: Vocabulary | None, source: str = "a training input") -> Vocabulary:
        """The vocabulary, which must be there.

        Raises:
            ValueError: it is None.
        """
        if vocabulary is None:
            raise ValueError(
                f"{source}: no class names; give 'vocabulary' or 'dataset_name' with the input, or set DATASETS.TRAIN "
                "to a registered dataset"
            )
        return vocabulary
