"""FGA-seg and CAT-Seg: aggregation of the cost volume, decoder, fast path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ovseg_d2.checkpoint.key_maps.base import KeyMap
from ovseg_d2.checkpoint.key_maps.cost_volume import COST_DROPPED, COST_RULES
from ovseg_d2.checkpoint.key_maps.pixel_alignment import ALIGNMENT_RULES
from ovseg_d2.modeling.pixel_classification.class_rows import RULED_OUT_LOGIT, ClassRows
from ovseg_d2.modeling.pixel_classification.cost_aggregation import (
    CostAggregation,
    CostAggregationLayer,
    CostEmbedding,
)
from ovseg_d2.modeling.pixel_classification.cost_decoder import CostDecoder
from ovseg_d2.modeling.pixel_classification.cost_head import CostHead, CostMaps
from ovseg_d2.modeling.pixel_classification.pixel_text_alignment import GlobalLocalSimilarity
from tests.parity import Case, Unsupported

COST_VOLUME = KeyMap(
    name="cost volume", recognises=lambda _keys: False, rules=COST_RULES + ALIGNMENT_RULES, dropped=COST_DROPPED
)
TRANSFORMER = "sem_seg_head.predictor.transformer."


def load(module: nn.Module, params: dict[str, Tensor], *, official: str, ours: str) -> nn.Module:
    """Load weights below ``official`` in a public checkpoint, by the map for whole checkpoints."""
    renamed = {COST_VOLUME.rename(f"{official}{name}"): tensor for name, tensor in params.items()}
    module.load_state_dict({name.removeprefix(ours): tensor for name, tensor in renamed.items() if name is not None})
    return module.eval()


def square_pooling(pooling: list[int]) -> int:
    if pooling[0] != pooling[1]:
        raise Unsupported(f"pooling by {pooling}")
    return pooling[0]


def as_reference(rows: ClassRows, x: Tensor) -> Tensor:
    """(R, h, w, C) -> (N, C, E, h, w)."""
    return rows.to_entries(x).permute(0, 4, 1, 2, 3)


@torch.no_grad()
def aggregator_layer(case: Case) -> dict[str, Any]:
    ctor, x = case.meta["constructor"], case.inputs["x"]
    module = CostAggregationLayer(
        dim=ctor["hidden_dim"],
        image_guidance_dim=ctor["appearance_guidance"],
        text_guidance_dim=ctor["text_guidance_dim"],
        num_heads=ctor["nheads"],
        window_size=ctor["window_size"],
        pooling=square_pooling(ctor["pooling_size"]),
        attention=ctor["attention_type"],
        pad_length=ctor["pad_len"],
    )
    load(module, case.params, official=f"{TRANSFORMER}layers.0.", ours="cost_head.aggregation.layers.0.")
    rows = ClassRows.of_mask(torch.ones(len(x), x.shape[2], dtype=torch.bool))
    volume = x.permute(0, 2, 3, 4, 1).flatten(0, 1)
    image_guidance = case.inputs["appearance_guidance"].permute(0, 2, 3, 1)
    text_guidance = case.inputs["text_guidance"].flatten(0, 1)
    after_swin = module.spatial(rows, volume, image_guidance)
    after_class = module.classes(rows, after_swin, text_guidance, chunk_size=len(rows))
    layer = module(rows, volume, image_guidance, text_guidance)
    results = {"after_swin": after_swin, "after_class": after_class, "layer": layer}
    return {name: as_reference(rows, y) for name, y in results.items()}


def cost_head(*, fusion: str | None, kernel_size: int | None, aux_heads: bool, ctor: dict[str, Any]) -> CostHead:
    """``ctor``: names of CAT-Seg's constructor."""
    dim = ctor["hidden_dim"]
    return CostHead(
        similarity=GlobalLocalSimilarity(dim=ctor["text_guidance_dim"], kernel_size=kernel_size),
        embedding=CostEmbedding(dim=dim, num_prompts=ctor["prompt_channel"], fusion=fusion),
        aggregation=CostAggregation(
            num_layers=ctor["num_layers"],
            image_dim=ctor["appearance_guidance_dim"],
            text_dim=ctor["text_guidance_dim"],
            image_guidance_dim=ctor["appearance_guidance_proj_dim"],
            text_guidance_dim=ctor["text_guidance_proj_dim"],
            dim=dim,
            num_heads=ctor["nheads"],
            window_size=ctor["window_size"],
            pooling=square_pooling(ctor["pooling_size"]),
            attention=ctor["attention_type"],
            pad_length=ctor["pad_len"],
        ),
        decoder=CostDecoder(
            dim=dim,
            dims=ctor["decoder_dims"],
            feature_dims=ctor["decoder_guidance_dims"],
            guidance_dims=ctor["decoder_guidance_proj_dims"],
            fusion=fusion,
            aux_heads=aux_heads,
        ),
        max_classes=ctor["pad_len"],
    )


def run(module: CostHead, case: Case, image: slice = slice(None)) -> CostMaps:
    x = {name: tensor[image] for name, tensor in case.inputs.items()}
    return module(x["img_feats"], x["text_feats"], (x["res4"], x["res5"]))


@torch.no_grad()
def catseg_aggregator(case: Case) -> dict[str, Any]:
    module = cost_head(fusion=None, kernel_size=None, aux_heads=False, ctor=case.meta["constructor"])
    load(module, case.params, official=TRANSFORMER, ours="cost_head.")
    return {"logits": run(module, case).logits}


@torch.no_grad()
def decoder(case: Case) -> dict[str, Any]:
    short = case.meta["constructor"]
    ctor = {
        "hidden_dim": short["hidden"],
        "text_guidance_dim": short["C"],
        "appearance_guidance_dim": short["C"],
        "text_guidance_proj_dim": short["T_dim_proj"],
        "appearance_guidance_proj_dim": short["app_proj"],
        "decoder_dims": short["ddims"],
        "decoder_guidance_dims": short["dgd"],
        "decoder_guidance_proj_dims": short["dgp"],
        "num_layers": short["layers"],
        "nheads": 4,
        "pooling_size": short["pool"],
        "window_size": short["window"],
        "attention_type": "linear",
        "prompt_channel": 1,
        "pad_len": short["pad_len"],
    }
    fast = short["kind"] == "fast"
    module = cost_head(fusion=short["fusion"], kernel_size=short["K"], aux_heads=fast, ctor=ctor)
    load(module, case.params, official=TRANSFORMER, ours="cost_head.")
    return fast_outputs(module, case) if fast else full_outputs(module, case)


def full_outputs(module: CostHead, case: Case) -> dict[str, Any]:
    results: dict[str, Any] = {}
    rows: list[ClassRows] = []

    def record(name: str, convert: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            rows[:] = [args[0]] if isinstance(args[0], ClassRows) else rows
            results[f"mid.{name}"] = convert(output)

        return hook

    aggregation = module.aggregation
    aggregation.image_guidance.register_forward_hook(record("guidance_projection", torch.relu))
    aggregation.text_guidance.register_forward_hook(
        record("text_guidance_projection", lambda y: torch.relu(y).unflatten(0, (len(case.inputs["res3"]), -1)))
    )
    for i, layer in enumerate(aggregation.layers):
        layer.register_forward_hook(record(f"layers.{i}", lambda y: as_reference(rows[0], y)))
    stages = {"decoder1": module.decoder.stages[0], "corr_local_decoder_projection": module.decoder.local_stage}
    for name, stage in stages.items():
        stage.register_forward_hook(record(name, lambda y: y.permute(0, 3, 1, 2)))
    maps = run(module, case)
    results["logits"] = maps.logits
    if not maps.attended.all():
        results["kept_classes_sorted"] = maps.attended.nonzero()[:, 1].unflatten(0, (len(maps.attended), -1))
    return results


def fast_outputs(module: CostHead, case: Case) -> dict[str, Any]:
    """The reference returns probabilities, zeros for what was ruled out, logits for what has no place."""
    module.train()
    trained = run(module, case)
    module.eval()
    module.top_k = case.meta["topk"]
    pruned = run(module, case)
    probs = torch.where(pruned.kept[..., None, None], pruned.logits.sigmoid(), 0.0)
    return {
        "train.logits": trained.logits,
        **{f"train.aux{i}": logits for i, logits in enumerate(trained.aux_logits)},
        "topk.output_per_image": torch.where(pruned.attended[..., None, None], probs, RULED_OUT_LOGIT),
    }


TOPICS = {
    "fgaseg/aggregator_layer": aggregator_layer,
    "fgaseg/catseg_aggregator": catseg_aggregator,
    "fgaseg/decoder": decoder,
}
