"""The Segment Anything Model as a source of mask proposals (MAFT, arXiv 2310.00240, section 5.4 and Table 5).

SAM (arXiv 2304.02643) and the rules that choose among its masks are those of ``transformers`` (extra ``sam``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ovseg_d2.modeling.clip.clip import Clip
from ovseg_d2.modeling.proposals.binary_masks import binary_proposals
from ovseg_d2.modeling.proposals.build import MASK_PROPOSAL_REGISTRY
from ovseg_d2.modeling.proposals.sam_model import build_sam, build_sam_processor
from ovseg_d2.structures import ClipFeatures, ImageBatch, MaskProposals, TextClasses, pad_masks

#: Masks are logits of SAM above this.
MASK_THRESHOLD = 0.0


@MASK_PROPOSAL_REGISTRY.register()
class SAMProposals(nn.Module):
    """SAM's automatic mask generation: every point of a grid gives three masks, of which the good ones stay.

    Frozen, and without class scores. The number of masks differs between images.
    """

    @configurable
    def __init__(
        self,
        *,
        sam: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        bgr: bool = False,
        points_per_side: int = 32,
        points_per_batch: int = 64,
        pred_iou_threshold: float = 0.88,
        stability_threshold: float = 0.95,
        stability_offset: float = 1.0,
        nms_threshold: float = 0.7,
        crop_layers: int = 0,
        min_area: int = 0,
        residual_mask: bool = True,
    ) -> None:
        """
        Args:
            sam: a ``SamModel`` of transformers.
            pixel_mean, pixel_std: of the images that come in, on the scale 0 to 255.
            bgr: their channels are in the order BGR.
            points_per_side, points_per_batch: the grid over the image, and how many of its points are decoded at once.
            pred_iou_threshold: masks whose IoU SAM expects to be no higher are dropped.
            stability_threshold, stability_offset: so are masks with no higher IoU between them cut at +offset and at
                -offset.
            nms_threshold: of boxes with a higher IoU the mask with the higher expected IoU stays.
            crop_layers: layer i looks for masks in 4^i overlapping crops of the image, too.
            min_area: masks of fewer pixels are dropped.
            residual_mask: what no mask of an image covers is one more mask.

        Raises:
            ValueError: no point, or a negative number of crop layers.
        """
        super().__init__()
        for key, value, least in (
            ("POINTS_PER_SIDE", points_per_side, 1),
            ("POINTS_PER_BATCH", points_per_batch, 1),
            ("CROP_LAYERS", crop_layers, 0),
        ):
            if value < least:
                raise ValueError(f"MODEL.OVSEG.PROPOSALS.SAM.{key} is {value}; expected at least {least}")
        self.sam = sam.requires_grad_(False).eval()
        self.image_size: int = sam.config.vision_config.image_size
        self.processor = build_sam_processor(self.image_size)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.bgr = bgr
        self.points_per_side, self.points_per_batch = points_per_side, points_per_batch
        self.pred_iou_threshold = pred_iou_threshold
        self.stability_threshold, self.stability_offset = stability_threshold, stability_offset
        self.nms_threshold = nms_threshold
        self.crop_layers = crop_layers
        self.min_area = min_area
        self.residual_mask = residual_mask

    @classmethod
    def from_config(cls, cfg: CfgNode, clip: Clip | None = None) -> dict[str, Any]:
        sam = cfg.MODEL.OVSEG.PROPOSALS.SAM
        return {
            "sam": build_sam(sam.NAME),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "bgr": cfg.INPUT.FORMAT == "BGR",
            "points_per_side": sam.POINTS_PER_SIDE,
            "points_per_batch": sam.POINTS_PER_BATCH,
            "pred_iou_threshold": sam.PRED_IOU_THRESHOLD,
            "stability_threshold": sam.STABILITY_THRESHOLD,
            "stability_offset": sam.STABILITY_OFFSET,
            "nms_threshold": sam.NMS_THRESHOLD,
            "crop_layers": sam.CROP_LAYERS,
            "min_area": sam.MIN_AREA,
            "residual_mask": cfg.MODEL.OVSEG.PROPOSALS.RESIDUAL_MASK,
        }

    def train(self, mode: bool = True) -> SAMProposals:
        """SAM stays as in evaluation."""
        super().train(mode)
        self.sam.eval()
        return self

    @torch.no_grad()
    def forward(
        self, images: ImageBatch, features: ClipFeatures | None = None, text: TextClasses | None = None
    ) -> MaskProposals:
        """
        Args:
            features, text: not used.

        Returns:
            Binary masks as certain logits (N, Q, H, W), the ones with the highest expected IoU first, without classes.
        """
        masks = []
        for tensor, (height, width) in zip(images.tensor, images.image_sizes, strict=True):
            image = tensor[:, :height, :width] * self.pixel_std + self.pixel_mean
            masks.append(pad_masks(self.generate(image.flip(0) if self.bgr else image), images.padded_size))
        return binary_proposals(masks, images, residual_mask=self.residual_mask)

    def generate(self, image: Tensor) -> Tensor:
        """Masks (Q, H, W) bool of an RGB image (3, H, W), 0 to 255; Q may be 0."""
        size = (image.shape[-2], image.shape[-1])
        boxes, points, crops, _ = self.processor.generate_crop_boxes(
            image, self.image_size, self.crop_layers, points_per_crop=self.points_per_side, device=image.device
        )
        inputs = self.processor(images=crops, input_data_format="channels_first", return_tensors="pt")
        input_sizes = inputs["reshaped_input_sizes"]
        codes: list[dict[str, Any]] = []
        scores, mask_boxes = [torch.zeros(0)], [torch.zeros(0, 4)]
        for row, (crop, box) in enumerate(zip(crops, boxes, strict=True)):
            embedding = self.sam.get_image_embeddings(inputs["pixel_values"][row : row + 1].to(image.device))
            for some_points in points[:, :, row : row + 1].split(self.points_per_batch, dim=1):
                low_resolution, expected_iou = self._decode(embedding, some_points)
                if not len(expected_iou):
                    continue
                logits = self.processor.post_process_masks(
                    [low_resolution[None]], [crop.shape[-2:]], input_sizes[row : row + 1], binarize=False
                )[0]
                found = self.processor.filter_masks(
                    logits,
                    expected_iou[None],
                    size,
                    box,
                    pred_iou_thresh=self.pred_iou_threshold,
                    stability_score_thresh=self.stability_threshold,
                    mask_threshold=MASK_THRESHOLD,
                    stability_score_offset=self.stability_offset,
                )
                codes.extend(found[0])
                scores.append(found[1].float().cpu())
                mask_boxes.append(found[2].float().cpu())
        if not codes:
            return torch.zeros((0, *size), dtype=torch.bool, device=image.device)
        kept = self.processor.post_process_for_mask_generation(
            codes, torch.cat(scores), torch.cat(mask_boxes), self.nms_threshold
        )[0]
        masks = torch.stack(kept)
        return masks[masks.flatten(1).sum(dim=1) >= max(1, self.min_area)].to(image.device)

    def _decode(self, embedding: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits (Q, h, w) of SAM's decoder, and the IoU (Q,) that it expects of them, where that is high enough.

        Choosing before the masks are enlarged is what keeps memory and time small.

        Args:
            embedding: (1, C, h', w') of the image.
            points: (1, P, 1, 2), (x, y) in the pixels of SAM's input.
        """
        found = self.sam(image_embeddings=embedding, input_points=points)
        good = found.iou_scores > self.pred_iou_threshold
        return found.pred_masks[good].float(), found.iou_scores[good].float()
