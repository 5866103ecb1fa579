"""FC-CLIP, and the ensembles of the other methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.checkpoint.convert import convert_state_dict
from ovseg_d2.data.vocabulary import vocabulary_from_names
from ovseg_d2.modeling.clip.clip import MAX_LOGIT_SCALE
from ovseg_d2.modeling.inference.mask_inference import (
    MaskInference,
    crop_and_resize,
    instance_inference,
    panoptic_inference,
    semantic_inference,
)
from ovseg_d2.modeling.layers.mask_pooling import pool_binary
from ovseg_d2.modeling.mask_classification.ensemble import class_table
from ovseg_d2.modeling.mask_classification.generator_classes import GeneratorClasses
from ovseg_d2.modeling.mask_classification.host_ensemble import HostEnsemble, calibrated
from ovseg_d2.modeling.mask_classification.similarity import cosine_logits
from ovseg_d2.modeling.meta_arch.fcclip import FCCLIP
from ovseg_d2.modeling.proposals.class_heads import TextClassHead
from ovseg_d2.modeling.proposals.mask_decoder import MaskedAttentionDecoder
from ovseg_d2.modeling.text_classifier import TextClassifier, averaged, class_logits
from ovseg_d2.structures import ClipFeatures, MaskProposals, TextClasses
from tests.parity import Case
from tests.parity_families.recorded import FixedProposals, idle_criterion, result_outputs


def recorded_text(case: Case) -> tuple[TextClasses, Tensor]:
    """Classes, and the row of "no object", from a recorded classifier whose last row it is."""
    counts, rows = case.inputs["num_templates"].long(), case.inputs["text_classifier"]
    text = TextClasses(
        embeds=rows[:-1, None],
        class_ids=torch.arange(len(counts)).repeat_interleave(counts),
        is_thing=torch.ones(len(counts), dtype=torch.bool),
        seen=torch.ones(len(counts), dtype=torch.bool),
    )
    return text, rows[-1:]


@torch.no_grad()
def mask_pooling(case: Case) -> dict[str, Any]:
    text, void_embed = recorded_text(case)
    scale = case.inputs["logit_scale"].exp().clamp(max=MAX_LOGIT_SCALE)
    return {
        "pooled": pool_binary(case.inputs["x"], case.inputs["mask"]),
        "logits": cosine_logits(case.inputs["query_embed"], text, scale, void_embed=void_embed),
    }


@torch.no_grad()
def transformer_decoder(case: Case) -> dict[str, Any]:
    ctor = case.meta["constructor"]
    features = case.indexed("x_{}")
    text, void_embed = recorded_text(case)
    module = MaskedAttentionDecoder(
        in_dim=ctor["in_channels"],
        dim=ctor["hidden_dim"],
        mask_dim=ctor["mask_dim"],
        class_head=TextClassHead(
            dim=ctor["hidden_dim"], mask_dim=ctor["mask_dim"], embed_dim=ctor["clip_embedding_dim"]
        ),
        num_queries=ctor["num_queries"],
        num_heads=ctor["nheads"],
        ffn_dim=ctor["dim_feedforward"],
        num_layers=ctor["dec_layers"],
        num_scales=len(features),
        pre_norm=ctor["pre_norm"],
        enforce_input_proj=ctor["enforce_input_project"],
    ).train()  # for the predictions of earlier layers; nothing in it is random
    official = {f"sem_seg_head.predictor.{key}": value for key, value in case.params.items()}
    converted, _ = convert_state_dict(official | {"void_embedding.weight": void_embed})
    prefix = "proposals.mask_decoder."
    assert all(key.startswith(prefix) for key in converted), sorted(converted)
    module.load_state_dict({key.removeprefix(prefix): value for key, value in converted.items()}, strict=True)
    last = module(features, case.inputs["mask_features"], text)
    outputs = {"pred_logits": last.class_logits, "pred_masks": last.mask_logits}
    for i, prediction in enumerate(last.aux):
        outputs[f"aux_{i}/pred_logits"] = prediction.class_logits
        outputs[f"aux_{i}/pred_masks"] = prediction.mask_logits
    return outputs


class RecordedClip(nn.Module):
    """Stands for CLIP: its recorded features of the images and of the texts, in the order in which texts come."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.dense, self.projection = case.inputs["clip_vis_dense"], case.inputs["visual_projection"]
        self.text_features = case.inputs["text_features"]
        self.positional_embedding = torch.zeros(3, 1)
        self.log_scale = case.meta["constructor"]["clip logit_scale (log)"]
        # Plain attributes: the parts are this very module.
        object.__setattr__(self, "visual", self)
        object.__setattr__(self, "text", self)

    def forward(self, x: Tensor) -> Any:
        if x.dim() == 2:
            return self.text_features[x[:, 0]]
        grid = (self.dense.shape[-2], self.dense.shape[-1])
        return ClipFeatures(image_embeds=x, dense=None, layers={"res5": self.dense}, grid=grid)

    def encode_masks(self, features: ClipFeatures, masks: Tensor, *, from_logits: bool = False) -> Tensor:
        assert from_logits
        return pool_binary(features.layers["res5"], masks) @ self.projection

    def scale(self) -> Tensor:
        return torch.tensor(self.log_scale).exp().clamp(max=MAX_LOGIT_SCALE)

    def weights_hash(self) -> str:
        return "recorded"


def numbered_texts(texts: list[str]) -> Tensor:
    """A tokenizer whose first token is the text's number and whose largest is not the last."""
    tokens = torch.zeros(len(texts), 3, dtype=torch.int64)
    tokens[:, 0], tokens[:, 1] = torch.arange(len(texts)), len(texts)
    return tokens


@torch.no_grad()
def fcclip_ensemble(case: Case) -> dict[str, Any]:
    ctor, x = case.meta["constructor"], case.inputs
    trained, vocabulary = (vocabulary_from_names(case.meta[f"{split}_class_names"]) for split in ("train", "test"))
    proposals = MaskProposals(class_logits=x["pred_logits"], mask_logits=x["pred_masks"])
    model = FCCLIP(
        proposals=FixedProposals(proposals),
        criterion=idle_criterion(len(trained)),
        ensemble_alpha=ctor["alpha"],
        ensemble_beta=ctor["beta"],
        ensemble_valid_masks_only=ctor["ensemble_on_valid_mask"],
        clip=RecordedClip(case),
        text_classifier=TextClassifier(
            tokenizer=numbered_texts, templates=case.meta["templates"], trained_vocabulary=trained
        ),
        pixel_mean=[0.0, 0.0, 0.0],
        pixel_std=[1.0, 1.0, 1.0],
        size_divisibility=ctor["size_divisibility"],
        inference=MaskInference(
            tasks=["semantic"],
            object_mask_threshold=0.0,
            overlap_threshold=0.0,
            postprocess_before_inference=ctor["sem_seg_postprocess_before_inference"],
            top_k=1,
            boxes_from_masks=False,
        ),
        vocabulary=trained,
    ).eval()
    height, width = case.meta["output_size"]
    batch = [
        {"image": image, "height": height, "width": width, "vocabulary": vocabulary}
        for image in case.indexed("image_{}")
    ]
    text = averaged(model.text(vocabulary))
    features = model.clip_features(model.preprocess(batch))
    mask_embeds = model.clip.encode_masks(features, x["pred_masks"], from_logits=True)
    return {
        "text_classifier_with_void": torch.cat([text.embeds[:, 0], F.normalize(x["void_embedding"], dim=-1)]),
        "category_overlapping_mask": text.seen.long(),
        "pooled_clip_feature": pool_binary(features.layers["res5"], x["pred_masks"]),
        "out_vocab_logits": cosine_logits(mask_embeds, text, model.clip.scale(), void_embed=x["void_embedding"]),
        "final_mask_cls": model.predict(model.preprocess(batch), vocabulary).class_logits,
        **result_outputs(model(batch)),
    }


@torch.no_grad()
def crop_ensemble(case: Case) -> dict[str, Any]:
    """ZSSeg, FreeSeg and OVSeg: an empty proposal is the generator's alone, or dropped where CLIP decides alone."""
    x = case.inputs
    proposal_logits = x["mask_cls_logits"]
    num_classes = proposal_logits.shape[-1] - 1
    seen = x["seen_flag"].bool() if "seen_flag" in x else torch.zeros(num_classes, dtype=torch.bool)
    valid = torch.ones(1, len(proposal_logits), dtype=torch.bool)
    valid[0, case.meta["empty_proposals"]] = False
    name = "ovseg" if case.topic.endswith("ovseg") else "zsseg"
    probs = HostEnsemble(name=name, weight=case.meta["lambda"])(
        x["clip_logits"][None, :, :-1], seen, proposal_logits=proposal_logits[None], valid=valid
    )
    return {"sem_seg": torch.einsum("qk,qhw->khw", probs[0], x["mask_logits"].sigmoid())}


@torch.no_grad()
def zegformer_ensemble(case: Case) -> dict[str, Any]:
    x, meta = case.inputs, case.meta
    seen = torch.zeros(meta["C"], dtype=torch.bool)
    seen[meta["seen"]] = True
    name = "zegformer" if meta["ENSEMBLING"] else "zegformer_all" if meta["ENSEMBLING_ALL_CLS"] else "zegformer_clip"
    probs = HostEnsemble(name=name)(x["clip_logits"], seen, proposal_logits=x["pred_logits"])
    divisor = meta["size_divisibility"]
    padded = [-(-max(sizes) // divisor) * divisor for sizes in zip(*meta["image_sizes"], strict=True)]
    masks = F.interpolate(x["pred_mask_logits"], size=padded, mode="bilinear", align_corners=False).sigmoid()
    outputs = {}
    for i, (image_size, output_size) in enumerate(zip(meta["image_sizes"], meta["output_sizes"], strict=True)):
        sem_seg = torch.einsum("qk,qhw->khw", probs[i], masks[i])
        sem_seg = crop_and_resize(sem_seg, image_size=tuple(image_size), output_size=tuple(output_size))
        outputs[f"sem_seg_{i}"] = calibrated(sem_seg, seen, max(meta["GZERO_CALIBRATE"], 0.0))
    return outputs


@torch.no_grad()
def maskclippp_ensemble(case: Case) -> dict[str, Any]:
    x, cfg = case.inputs, case.meta["cfg"]
    trained, vocabulary = (vocabulary_from_names(case.meta[f"{split}_classes"]) for split in ("train", "test"))
    num_classes = len(vocabulary)
    is_thing = torch.tensor([i in case.meta["test_thing_ids"] for i in range(num_classes)])
    options = {"closed": cfg["closed_classifier"], "trained": trained}
    ensemble = GeneratorClasses(
        name="maskclippp",
        alpha=cfg["GEOMETRIC_ENSEMBLE_ALPHA"],
        beta=cfg["GEOMETRIC_ENSEMBLE_BETA"],
        **options,
    )
    clip_alone = GeneratorClasses(**options)
    counts = x["num_synonyms"].long()
    all_logits = class_logits(x["corrs"], torch.arange(num_classes).repeat_interleave(counts), num_classes)
    outputs: dict[str, Any] = {"train2test_lut": class_table(trained, vocabulary), "segments_info": []}
    for i, proposal_logits in enumerate(case.indexed("segmentor_logits_{}")):
        logits = all_logits[x["mask2batch"] == i]
        proposal_probs, _ = ensemble.probs(proposal_logits, vocabulary)
        proposals = MaskProposals(mask_logits=x[f"masks_{i}"][None], class_logits=proposal_logits[None])
        final = ensemble.combine(logits[None], proposals, vocabulary)[0]
        masks = F.interpolate(
            x[f"masks_{i}"][None], size=tuple(case.meta["original_size"]), mode="bilinear", align_corners=False
        )[0]
        mask_logits = masks.logit()
        no_void = torch.cat([logits, torch.full_like(logits[:, :1], float("-inf"))], dim=-1)
        outputs |= {
            f"pred_logits_{i}": logits,
            f"ensembled_{i}": ensemble.ensembled(logits, proposal_probs, vocabulary),
            f"with_void_{i}": final,
            f"with_void_noensemble_{i}": clip_alone.combine(logits[None], proposals, vocabulary)[0],
            f"resized_masks_{i}": masks,
            f"sem_seg_{i}": semantic_inference(final.softmax(-1), mask_logits),
            f"sem_seg_novoid_{i}": semantic_inference(no_void.softmax(-1), mask_logits),
        }
        outputs[f"panoptic_{i}"], segments = panoptic_inference(
            final.softmax(-1),
            mask_logits,
            is_thing=is_thing,
            object_mask_threshold=cfg["object_mask_threshold"],
            overlap_threshold=cfg["overlap_threshold"],
        )
        outputs["segments_info"].append(segments)
        instances = instance_inference(
            final.softmax(-1),
            mask_logits,
            is_thing=is_thing,
            top_k=cfg["topk"],
            boxes_from_masks=cfg["instance_box_on"],
        )
        outputs |= {
            f"inst_scores_{i}": instances.scores,
            f"inst_classes_{i}": instances.pred_classes,
            f"inst_masks_{i}": instances.pred_masks,
            f"inst_boxes_{i}": instances.pred_boxes.tensor,
        }
    return outputs


TOPICS = {
    "fcclip/mask_pooling": mask_pooling,
    "fcclip/transformer_decoder": transformer_decoder,
    "fcclip/ensemble": fcclip_ensemble,
    "maft/ensemble": crop_ensemble,
    "maft/ensemble_freeseg": crop_ensemble,
    "maft/ensemble_ovseg": crop_ensemble,
    "maft/ensemble_zegformer": zegformer_ensemble,
    "maskclippp/ensemble": maskclippp_ensemble,
}
