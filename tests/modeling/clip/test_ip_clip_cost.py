"""What IP-CLIP costs beside crops: multiply-adds of ViT-B/16, counted while the real code runs (MAFT, Table 4a)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ovseg_d2.modeling.clip.build import build_clip
from ovseg_d2.modeling.clip.vit import ClipViT

PROPOSALS = 100


@pytest.fixture(scope="module")
def encoder() -> ClipViT:
    """Nothing is computed on the meta device: shapes are enough for counting."""
    options = {"mask_mode": "maft", "start_layer": 8, "last_block": "none"}
    with torch.device("meta"):
        return build_clip("ViT-B-16", visual_kwargs=options, with_text=False).visual.eval().requires_grad_(False)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def gigamacs(run: Callable[[], object]) -> tuple[float, float]:
    """Of everything; of the patch embedding and the feed-forward networks alone, as the paper counts."""
    with FlopCounterMode(display=False) as counter:
        run()
    modules = counter.get_flop_counts()
    paper = sum(sum(modules[name].values()) for name in modules if name.rsplit(".", 1)[-1] in ("conv1", "mlp"))
    return counter.get_total_flops() / 2e9, paper / 2e9


def test_crops(encoder):
    total, paper = gigamacs(lambda: encoder(meta(PROPOSALS, 3, 224, 224)))
    assert f"{paper:.1f}" == "1127.0"
    assert 1750 <= total <= 1760


def test_ip_clip(encoder):
    images, masks = meta(1, 3, 480, 480), meta(1, PROPOSALS, 480, 480)
    # The paper takes the image's tokens through the last block, too, where no mask token needs them any more.
    total, paper = gigamacs(lambda: list(encoder.mask_states(encoder(images), masks, finish_image=True)))
    assert total > 97  # with the image's own embedding
    total, paper = gigamacs(
        lambda: list(encoder.mask_states(encoder(images, masks_only=True), masks, finish_image=True))
    )
    assert f"{paper:.1f}" == "53.4"
    assert total <= 97
    total, paper = gigamacs(lambda: encoder.encode_masks(encoder(images, masks_only=True), masks))
    assert f"{paper:.1f}" == "49.2"
    assert total <= 90


def test_a_mask_costs_the_same_whatever_their_number(encoder):
    features = encoder(meta(1, 3, 480, 480), masks_only=True)
    totals = [gigamacs(lambda n=n: encoder.encode_masks(features, meta(1, n, 480, 480)))[0] for n in (50, 100, 200)]
    assert totals[2] - totals[1] == pytest.approx(2 * (totals[1] - totals[0]))
