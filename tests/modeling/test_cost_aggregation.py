"""Spatial and class aggregation against plain restatements: every pair of tokens, every padding class written out."""

import pytest
import torch
from torch.nn import functional as F

from ovseg_d2.modeling.layers.windows import from_windows, to_windows, window_mask
from ovseg_d2.modeling.pixel_classification.class_rows import ClassRows, in_chunks
from ovseg_d2.modeling.pixel_classification.cost_aggregation import ClassAggregation, Fusion
from ovseg_d2.modeling.pixel_classification.guided_attention import ClassAttention
from ovseg_d2.modeling.pixel_classification.spatial_aggregation import GuidedSwinBlock, SpatialAggregation
from tests.helpers import randomise

DIM, GUIDANCE = 8, 6
KEPT = torch.tensor([[True, False, True, True], [False, True, False, False], [True, True, True, True]])


def test_rows_of_a_mask():
    rows = ClassRows.of_mask(KEPT)
    assert len(rows) == 8 and rows.counts().tolist() == [3, 1, 4] and not rows.is_full
    values = torch.randn(3, 4, 2)
    assert torch.equal(rows.of_entries(values), values[KEPT])
    assert torch.equal(rows.to_entries(values[KEPT], fill=-5), values.where(KEPT[..., None], -5.0))
    assert torch.equal(rows.of_images(values)[3], values[1])
    assert torch.equal(rows.kept(), KEPT)
    chosen = rows.select(torch.arange(8) != 3)  # the second image loses its only one
    assert chosen.counts().tolist() == [3, 0, 4] and not chosen.kept()[1].any()
    packed, taken = chosen.packed()
    assert packed.entry_ids.tolist() == [0, 1, 2, 0, 1, 2, 3] and taken.sum(1).tolist() == [3, 0, 4]
    everything = ClassRows.of_mask(torch.ones(3, 4, dtype=torch.bool))
    assert everything.is_full and everything.packed()[1] is None
    assert torch.equal(everything.to_entries(everything.of_entries(values)), values)


def test_chunks_are_the_same():
    rows, x = ClassRows.of_mask(KEPT), torch.randn(8, 2)

    def function(rows, x, y):
        return x * rows.image_ids[:, None] + y

    whole = function(rows, x, x)
    assert torch.equal(in_chunks(function, rows, x, x, size=3), whole)
    with torch.no_grad():
        assert torch.equal(in_chunks(function, rows, x, x, size=3), whole)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_windows_and_back(shift):
    x = torch.randn(2, 5, 7, 3)
    windows = to_windows(x, window_size=4, shift=shift)
    assert windows.shape == (2 * 2 * 2, 16, 3)
    assert torch.equal(from_windows(windows, (5, 7), window_size=4, shift=shift), x)


def test_no_mask_where_there_is_nothing_to_hide():
    options = {"window_size": 4, "device": torch.device("cpu")}
    assert window_mask((5, 7), shift=0, **options) is None
    assert window_mask((8, 4), shift=0, hide_padding=True, **options) is None
    assert window_mask((8, 7), shift=0, hide_padding=True, **options).shape == (4, 16, 16)


def may_see(size, window, shift):
    """(L, L) bool from the definition: same window of the shifted grid, both or neither carried around the border."""

    def axis(length):
        padded = -(-length // window) * window
        position = torch.arange(length)
        place = (position - shift) % padded // window
        carried = position < shift
        return (place[:, None] == place) & (carried[:, None] == carried)

    rows, columns = axis(size[0]), axis(size[1])
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


@pytest.mark.parametrize(("size", "window", "shift"), [((5, 7), 3, 0), ((5, 7), 3, 1), ((4, 6), 2, 1), ((7, 4), 4, 2)])
@torch.no_grad()
def test_swin_block_against_all_pairs(size, window, shift):
    """Grids that are no multiple of the window: nothing looks at the padding."""
    torch.manual_seed(0)
    block = randomise(GuidedSwinBlock(dim=DIM, guidance_dim=GUIDANCE, num_heads=2))
    rows = ClassRows.of_mask(KEPT)
    x, guidance = torch.randn(len(rows), *size, DIM), torch.randn(3, *size, GUIDANCE)
    got = block(rows, x, guidance, window_size=window, shift=shift)

    own = F.layer_norm(x, (DIM,), block.norm1.weight, block.norm1.bias).flatten(1, 2)
    both = torch.cat([own, guidance[rows.image_ids].flatten(1, 2)], dim=-1)
    q, k, v = (
        y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (block.qkv.q(both), block.qkv.k(both), block.qkv.v(own))
    )
    logits = (q @ k.mT / 2).masked_fill(~may_see(size, window, shift), float("-inf"))
    x = x + block.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)).unflatten(1, size)
    x = x + block.mlp.linear2(F.gelu(block.mlp.linear1(block.norm2(x))))
    torch.testing.assert_close(got, x)


@torch.no_grad()
def test_maps_smaller_than_the_window_do_not_shift():
    """Swapping the halves of a map is seen by shifted windows alone."""
    module = randomise(SpatialAggregation(dim=DIM, guidance_dim=GUIDANCE, num_heads=2, window_size=4))
    rows = ClassRows.of_mask(torch.ones(1, 2, dtype=torch.bool))
    x, guidance = torch.randn(2, 3, 6, DIM), torch.randn(1, 3, 6, GUIDANCE)
    swapped = module(rows, x.roll(3, dims=2), guidance.roll(3, dims=2))
    torch.testing.assert_close(swapped.roll(3, dims=2), module(rows, x, guidance))


@pytest.mark.parametrize("kind", ["linear", "full"])
@pytest.mark.parametrize("pad_length", [0, 3, 9])
@torch.no_grad()
def test_class_attention_with_every_padding_class_written_out(kind, pad_length):
    """Images keep 3, 1 and 4 classes; with 3, the last needs no padding."""
    torch.manual_seed(0)
    module = randomise(
        ClassAggregation(dim=DIM, guidance_dim=GUIDANCE, num_heads=2, attention=kind, pooling=1, pad_length=pad_length)
    )
    rows = ClassRows.of_mask(KEPT)
    x, guidance = torch.randn(len(rows), 2, 3, DIM), torch.randn(len(rows), GUIDANCE)
    got = module(rows, x, guidance, chunk_size=5)
    for image in range(3):
        mine = rows.image_ids == image
        tokens, texts = x[mine].flatten(1, 2).transpose(0, 1), guidance[mine].expand(6, -1, -1)
        missing = max(pad_length - int(mine.sum()), 0)
        if missing:
            tokens = torch.cat([tokens, module.pad_token.expand(6, missing, -1)], dim=1)
            texts = torch.cat([texts, module.pad_guidance.expand(6, missing, -1)], dim=1)
        normed = module.norm1(tokens)
        both = torch.cat([normed, texts], dim=-1)
        projections = module.attention.qkv
        q, k, v = (
            y.unflatten(-1, (2, -1)).transpose(1, 2)
            for y in (projections.q(both), projections.k(both), projections.v(normed))
        )
        if kind == "full":
            out = (q @ k.mT / 2).softmax(-1) @ v
        else:
            weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
            out = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
        tokens = tokens + out.transpose(1, 2).flatten(2)
        tokens = tokens + module.mlp.linear2(F.relu(module.mlp.linear1(module.norm2(tokens))))
        expected = x[mine] + tokens[:, : int(mine.sum())].transpose(0, 1).unflatten(1, (2, 3))
        torch.testing.assert_close(got[mine], expected)


@torch.no_grad()
def test_linear_attention_of_many_classes_in_half_precision():
    """The sum of the weights is beyond 65504, the largest number of float16."""
    torch.manual_seed(0)
    module = ClassAttention(dim=32, guidance_dim=GUIDANCE, num_heads=1, kind="linear")
    for linear in (module.qkv.q, module.qkv.k):
        linear.bias.fill_(5)
    rows = ClassRows.of_mask(torch.ones(1, 300, dtype=torch.bool))
    pad = (torch.randn(32), torch.randn(GUIDANCE), torch.tensor([20]))
    inputs = (rows, torch.randn(300, 1, 2, 32), torch.randn(300, GUIDANCE), pad)
    expected = module(*inputs)
    with torch.autocast("cpu", dtype=torch.float16):
        got = module(*inputs)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 3)])
@torch.no_grad()
def test_pooling_of_any_grid(size):
    module = randomise(
        ClassAggregation(dim=DIM, guidance_dim=GUIDANCE, num_heads=2, attention="linear", pooling=2, pad_length=4)
    )
    rows = ClassRows.of_mask(KEPT)
    out = module(rows, torch.randn(len(rows), *size, DIM), torch.randn(len(rows), GUIDANCE), chunk_size=64)
    assert out.shape == (len(rows), *size, DIM) and out.isfinite().all()


def test_bad_choices():
    with pytest.raises(ValueError, match=r"FUSION is 'mean'; expected one of \['cat', 'add'\]"):
        Fusion(dim=DIM, mode="mean")
    with pytest.raises(ValueError, match=r"CLASS_ATTENTION is 'cosine'; expected one of \['linear', 'full'\]"):
        ClassAttention(dim=DIM, guidance_dim=GUIDANCE, num_heads=2, kind="cosine")
