"""The generators of ZegFormer, ZSSeg and OVSeg (MaskFormer) and of FreeSeg (with its look at the texts)."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn
from torch.nn import functional as F

from ovseg_d2.modeling.losses.set_criterion import SetCriterion
from ovseg_d2.modeling.proposals import build_mask_proposals
from ovseg_d2.modeling.proposals.context_interaction import ContextInteraction
from ovseg_d2.modeling.proposals.fpn_pixel_decoder import FPNPixelDecoder
from ovseg_d2.modeling.proposals.transformer_decoder import TransformerDecoderLayer
from ovseg_d2.structures import ImageBatch, SegmentationTargets, TextClasses
from tests.helpers import randomise, tiny_cfg

DIM = 24
CLIP = SimpleNamespace(embed_dim=DIM)  # generators take nothing else from it
GENERATORS = ["MaskFormerProposals", "FreeSegProposals"]


def make_cfg(name, class_head="embed"):
    cfg = tiny_cfg()
    prop = cfg.MODEL.OVSEG.PROPOSALS
    prop.NAME, prop.CLASS_HEAD = name, class_head
    prop.EMBED_HIDDEN_DIM, prop.INTERACTION_DIM, prop.INTERACTION_HEADS = 40, 48, 4
    prop.DEC_LAYERS = 3
    return cfg


def make_generator(name, class_head="embed", **keys):
    cfg = make_cfg(name, class_head)
    for key, value in keys.items():
        cfg.MODEL.OVSEG.PROPOSALS[key] = value
    return randomise(build_mask_proposals(cfg, CLIP)).eval()


@pytest.fixture(scope="module", params=GENERATORS)
def generator(request):
    return make_generator(request.param)


def make_text(*synonyms, seed=0):
    """Classes with so many entries each."""
    generator = torch.Generator().manual_seed(seed)
    embeds = F.normalize(torch.randn(sum(synonyms), 1, DIM, generator=generator), dim=-1)
    flags = torch.ones(len(synonyms), dtype=torch.bool)
    class_ids = torch.arange(len(synonyms)).repeat_interleave(torch.tensor(synonyms))
    return TextClasses(embeds=embeds, class_ids=class_ids, is_thing=flags, seen=flags)


def make_images(*size, batch=2, seed=0):
    tensor = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))
    return ImageBatch(tensor=tensor, image_sizes=[size] * batch, image_ids=list(range(batch)))


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (97, 33)])
def test_shapes(generator, size):
    generator.mask_decoder.train()
    result = generator(make_images(*size), text=make_text(1, 1, 1))
    generator.mask_decoder.eval()
    assert generator(make_images(*size), text=make_text(1, 1, 1)).aux == []
    stride4 = tuple(-(-n // 4) for n in size)
    # Mask2Former's decoder also predicts from the queries before its first layer.
    assert len(result.aux) == (3 if hasattr(generator, "interaction") else 2)
    for prediction in (result, *result.aux):
        assert prediction.mask_logits.shape == (2, 6, *stride4) and prediction.mask_logits.isfinite().all()
        assert prediction.class_logits.shape == (2, 6, 4) and prediction.class_logits.isfinite().all()
        assert prediction.query_embeds.shape == (2, 6, 32)


@torch.no_grad()
def test_batch_equals_single(generator):
    images, text = make_images(64, 40), make_text(1, 2, 1)
    together = generator(images, text=text)
    for i in range(2):
        one = ImageBatch(tensor=images.tensor[i : i + 1], image_sizes=[(64, 40)], image_ids=[i])
        single = generator(one, text=text)
        torch.testing.assert_close(single.mask_logits[0], together.mask_logits[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(single.class_logits[0], together.class_logits[i], rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_permuted_classes_permute_the_classification(generator):
    text, order = make_text(1, 1, 1, 1), [2, 0, 3, 1]
    permuted = make_text(1, 1, 1, 1)
    permuted.embeds = text.embeds[order]
    before, after = (generator(make_images(40, 56), text=t) for t in (text, permuted))
    torch.testing.assert_close(after.mask_logits, before.mask_logits, rtol=1e-4, atol=1e-4)
    probs = before.class_logits.softmax(-1)
    torch.testing.assert_close(after.class_logits.softmax(-1), probs[..., [*order, 4]], rtol=1e-3, atol=1e-4)
    assert float((probs - probs.mean(-1, keepdim=True)).abs().max()) > 1e-2


@torch.no_grad()
def test_one_class(generator):
    result = generator(make_images(40, 56, batch=1), text=make_text(1))
    assert result.class_logits.shape == (1, 6, 2) and result.class_logits.isfinite().all()


@torch.no_grad()
def test_synonyms(generator):
    """The classification is by the nearest entry of a class."""
    images, apart = make_images(40, 56), make_text(1, 1, 1, 1)
    together = make_text(2, 1, 1)
    torch.testing.assert_close(apart.embeds, together.embeds)
    four, three = (generator(images, text=text) for text in (apart, together))
    torch.testing.assert_close(three.mask_logits, four.mask_logits)  # FreeSeg's masks see all entries
    expected = torch.cat([four.class_logits[..., :2].amax(-1, keepdim=True), four.class_logits[..., 2:]], dim=-1)
    torch.testing.assert_close(three.class_logits, expected)


@torch.no_grad()
def test_only_freeseg_masks_depend_on_the_classes(generator):
    images = make_images(40, 56)
    one, other = (generator(images, text=make_text(1, 1, seed=seed)).mask_logits for seed in (0, 1))
    assert (float((one - other).abs().max()) > 1e-3) == hasattr(generator, "interaction")


@torch.no_grad()
def test_the_row_of_no_object_is_among_freesegs_texts():
    generator = make_generator("FreeSegProposals")
    images, text = make_images(40, 56), make_text(1, 1)
    before = generator(images, text=text).mask_logits
    void = generator.mask_decoder.class_embed.void_embedding.weight
    void.mul_(3.0)  # its direction alone counts
    torch.testing.assert_close(generator(images, text=text).mask_logits, before)
    void.neg_()
    assert float((generator(images, text=text).mask_logits - before).abs().max()) > 1e-4


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("class_head", ["linear", "text", "none"])
def test_other_class_heads(name, class_head):
    generator = make_generator(name, class_head).train()
    result = generator(make_images(40, 56), text=make_text(1, 1, 1, 1, 1))
    if class_head == "none":
        assert result.class_logits is None
        loss = sum(prediction.mask_logits.square().mean() for prediction in (result, *result.aux))
    else:
        assert result.class_logits.shape == (2, 6, 6)
        loss = sum(
            prediction.mask_logits.square().mean() + prediction.class_logits.square().mean()
            for prediction in (result, *result.aux)
        )
    loss.backward()
    assert [n for n, p in generator.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("name", GENERATORS)
def test_training_lowers_the_loss(name):
    torch.manual_seed(0)
    cfg = make_cfg(name)
    cfg.MODEL.OVSEG.PROPOSALS.DEC_DROPOUT = 0.1
    generator = build_mask_proposals(cfg, CLIP).train()
    criterion = SetCriterion.from_config(cfg)
    images, text = make_images(64, 64), make_text(1, 2, 1)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 5:40, 10:50], masks[1, 30:, :20] = True, True
    targets = [SegmentationTargets(torch.tensor([0, 2]), masks), SegmentationTargets(torch.tensor([1]), masks[:1])]
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-3)
    totals = []
    for _ in range(20):
        loss = sum(criterion(generator(images, text=text), targets, images.image_ids).values())
        optimizer.zero_grad()
        loss.backward()
        assert [n for n, p in generator.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
        totals.append(loss.item())
    assert sum(totals[-5:]) < 0.8 * sum(totals[:5])


def test_dropout_is_for_training():
    generator = make_generator("MaskFormerProposals", DEC_DROPOUT=0.3)
    images, text = make_images(40, 56), make_text(1, 1)
    with torch.no_grad():
        first, second = (generator(images, text=text).mask_logits for _ in range(2))
        assert torch.equal(first, second)
        generator.train()
        assert not torch.equal(generator(images, text=text).mask_logits, first)


@torch.no_grad()
@pytest.mark.parametrize("pre_norm", [False, True])
def test_decoder_layer_is_that_of_pytorch(pre_norm):
    """Without positions, DETR's layer is the transformer's."""
    ours = randomise(TransformerDecoderLayer(dim=16, num_heads=4, ffn_dim=24, dropout=0.1, pre_norm=pre_norm)).eval()
    theirs = nn.TransformerDecoderLayer(16, 4, 24, batch_first=True, norm_first=pre_norm).eval()
    weights = {}
    for name, value in ours.state_dict().items():
        block, kind, *rest = name.split(".")
        number = {"self_attn": 1, "cross_attn": 2, "ffn": 3}[block]
        attention = {"self_attn": "self_attn", "cross_attn": "multihead_attn"}.get(block)
        place = f"norm{number}" if kind == "norm" else attention if kind == "attn" else kind
        weights[".".join([place, *rest])] = value
    theirs.load_state_dict(weights)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    torch.testing.assert_close(ours(x, torch.zeros_like(x), memory, memory), theirs(x, memory), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_positions_are_in_queries_and_keys():
    layer = randomise(TransformerDecoderLayer(dim=16, num_heads=4, ffn_dim=24, dropout=0.0, pre_norm=False)).eval()
    x, x_pos, memory, pos = (torch.randn(2, n, 16) for n in (5, 5, 9, 9))
    expected = layer.self_attn.norm(x + layer.self_attn.attn(x + x_pos, x + x_pos, x))
    expected = layer.cross_attn.norm(expected + layer.cross_attn.attn(expected + x_pos, memory + pos, memory))
    torch.testing.assert_close(layer(x, x_pos, memory, memory + pos), layer.ffn(expected))


@torch.no_grad()
@pytest.mark.parametrize("norm", ["GN", ""])
def test_pyramid(norm):
    shapes = {"res3": ShapeSpec(channels=6, stride=8), "res2": ShapeSpec(channels=4, stride=4)}
    module = randomise(FPNPixelDecoder(input_shape=shapes, dim=32, mask_dim=12, norm=norm)).eval()
    fine, coarse = torch.randn(2, 4, 9, 14), torch.randn(2, 6, 5, 7)
    result = module({"res2": fine, "res3": coarse})

    def normalised(conv, x):
        return x if not norm else F.group_norm(x, 32, conv.norm.weight, conv.norm.bias)

    (lateral,), (output_fine, output_coarse) = module.lateral, module.output
    low = normalised(output_coarse, F.conv2d(coarse, output_coarse.weight, output_coarse.bias, padding=1)).relu()
    # Nearest: row i of 9 is row floor(i * 5 / 9) of the coarse map.
    up = low[:, :, torch.arange(9) * 5 // 9][..., torch.arange(14) * 7 // 14]
    high = normalised(lateral, F.conv2d(fine, lateral.weight, lateral.bias)) + up
    high = normalised(output_fine, F.conv2d(high, output_fine.weight, output_fine.bias, padding=1)).relu()
    masks = F.conv2d(high, module.mask_features.weight, module.mask_features.bias, padding=1)
    torch.testing.assert_close(result.mask_features, masks, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.multi_scale[0], low, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.multi_scale[1], high, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_further_row_of_texts_changes_every_map():
    module = randomise(ContextInteraction(dim=8, text_dim=DIM, inner_dim=16, num_heads=4)).eval()
    maps = [torch.randn(2, 8, 3, 5), torch.randn(2, 8, 7, 4)]
    rows = torch.randn(6, DIM)
    few, many = module(maps, rows[:5]), module(maps, rows)
    assert [m.shape for m in few] == [m.shape for m in maps]
    assert all(float((a - b).abs().max()) > 1e-4 for a, b in zip(few, many, strict=True))
    order = torch.randperm(6)
    for a, b in zip(module(maps, rows[order]), many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # Without attention, what is left is the normalised map: the skip connection starts there.
    module.gamma.zero_()
    plain = F.layer_norm(maps[0].movedim(1, -1), (8,), module.query_norm.weight, module.query_norm.bias)
    torch.testing.assert_close(module(maps, rows)[0], plain.movedim(-1, 1))
    module.train().gamma.fill_(1.0)
    assert not torch.equal(module(maps, rows)[0], module(maps, rows)[0])


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("MaskFormerProposals", "IN_FEATURES", ["res2", "p7"], r"IN_FEATURES: \['p7'\] are not among the outputs"),
        ("MaskFormerProposals", "DEC_LAYERS", 0, "DEC_LAYERS: got 0; MaskFormerProposals needs at least 1"),
        ("MaskFormerProposals", "EMBED_LAYERS", 0, "EMBED_LAYERS: got 0; expected at least 1"),
        ("MaskFormerProposals", "TEMPERATURE", 0.0, "TEMPERATURE: got 0.0; expected a positive number"),
        ("FreeSegProposals", "MASK_DIM", 64, "MASK_DIM: got 64; .* needs PIXEL_DIM, 32"),
        ("FreeSegProposals", "INTERACTION_DIM", 50, "INTERACTION_DIM: got 50; expected a multiple of .*HEADS, 4"),
    ],
)
def test_bad_configurations(name, key, value, message):
    cfg = make_cfg(name)
    cfg.MODEL.OVSEG.PROPOSALS[key] = value
    with pytest.raises(ValueError, match=message):
        build_mask_proposals(cfg, CLIP)


def test_what_needs_a_clip():
    with pytest.raises(ValueError, match="FreeSegProposals needs a model with CLIP.*Mask2Former is not"):
        build_mask_proposals(make_cfg("FreeSegProposals", "none"))
    with pytest.raises(ValueError, match="CLASS_HEAD: 'embed' needs a model with CLIP"):
        build_mask_proposals(make_cfg("MaskFormerProposals"))
    assert build_mask_proposals(make_cfg("MaskFormerProposals", "none")).mask_decoder.class_embed is None
