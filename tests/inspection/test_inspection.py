"""Opinions, maps and embeddings are those of the model's own results, for every kind of model; others say so."""

import pytest
import torch
from detectron2.modeling import build_model

from ovseg_d2.evaluation.mask_recall import mask_ious
from ovseg_d2.inspection.embeddings import class_texts, labelled_masks, labelled_pixels, mask_embeds
from ovseg_d2.inspection.figures import embedding_scatter, heat_maps, proposal_cards
from ovseg_d2.inspection.maps import on_image, pseudo_masks, similarity_maps
from ovseg_d2.inspection.masks import best_masks, mask_opinions
from tests.helpers import random_input, randomise, tiny_cfg
from tests.modeling import tiny_fcclip, tiny_fga_seg, tiny_hosts, tiny_ldvc, tiny_maskclippp, tiny_mta_clip

SIZES = ((40, 56), (45, 33))
COLOURS = tiny_fcclip.COLOURS


def batch_of(model, num_classes=4):
    batch = [random_input(size, num_classes=num_classes, num_masks=3, seed=i) for i, size in enumerate(SIZES)]
    for x in batch:
        x["proposals"] = x["instances"].gt_masks.tensor
    return model.preprocess(batch), [x["instances"] for x in batch]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["fcclip", "host", "maskclippp", "mta_clip"])
def test_opinions_and_embeddings_of_masks(kind):
    model = {
        "fcclip": tiny_fcclip.random_fcclip,
        "host": tiny_hosts.random_host,
        "maskclippp": tiny_maskclippp.random_maskclippp,
        "mta_clip": tiny_mta_clip.random_mta,
    }[kind]().eval()
    images, truth = batch_of(model)
    opinions = mask_opinions(model, images, COLOURS)
    final = model.predict(images, COLOURS)
    expected = final.class_logits.softmax(-1) if final.class_probs is None else final.class_probs
    last = list(opinions.probs.values())[-1]
    torch.testing.assert_close(last[..., :4], expected[..., :4], rtol=1e-4, atol=1e-6)
    assert set(opinions.probs) <= {"generator", "CLIP", "ensemble"}
    assert kind != "fcclip" or list(opinions.probs) == ["generator", "CLIP", "ensemble"]
    assert opinions.masks(1, (45, 33)).shape == (last.shape[1], 45, 33)
    embeds = mask_embeds(model, images, COLOURS)
    assert embeds.shape[:2] == last.shape[:2]
    texts = class_texts(model, images, COLOURS)
    assert texts.shape == (4, embeds.shape[-1])
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(4))
    # The model's own masks as the truth: all of them are found, in their order.
    masks = [opinions.masks(row, size) for row, size in enumerate(SIZES)]
    full = [one.flatten(1).any(1) & opinions.valid[row] for row, one in enumerate(masks)]
    kept = [one[rows] for one, rows in zip(masks, full, strict=True)]
    vectors, labels = labelled_masks(
        model, images, COLOURS, [torch.zeros(len(m), dtype=torch.int64) for m in kept], kept
    )
    assert len(vectors) == len(labels) == sum(map(len, kept))
    assert kind == "mta_clip" or len(labels) > 0
    vectors, labels = labelled_masks(model, images, COLOURS, [torch.zeros(0)] * 2, [torch.zeros(0, *s) for s in SIZES])
    assert vectors.shape == (0, embeds.shape[-1]) and len(labels) == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["LDVC", "ZegCLIP", "FGASeg"])
def test_maps_of_words(kind):
    if kind == "FGASeg":
        model = tiny_fga_seg.make(tiny_fga_seg.fga_cfg())
    else:
        model = tiny_ldvc.make(tiny_ldvc.ldvc_cfg(kind))
    images, truth = batch_of(model, 5)
    vocabulary = random_input((8, 8), num_classes=5, num_masks=0)["vocabulary"]
    maps = similarity_maps(model, images, vocabulary)
    assert list(maps) == (["global", "local", "result"] if kind == "FGASeg" else ["CLIP", "attention", "result"])
    result = model.predict(images, vocabulary).mask_logits.sigmoid()
    torch.testing.assert_close(maps["result"], result, rtol=1e-4, atol=1e-5)
    if kind == "LDVC":  # of each pixel over the classes; the block itself shows that it is this attention
        torch.testing.assert_close(maps["attention"].sum(1), torch.ones_like(maps["attention"][:, 0]))
        block = model.decoder.blocks[-1].cross_attention
        block.q_proj.weight.zero_(), block.q_proj.bias.zero_()
        even = similarity_maps(model, images, vocabulary)["attention"]
        torch.testing.assert_close(even, torch.full_like(even, 1 / 5))
    if kind == "ZegCLIP":
        torch.testing.assert_close(maps["attention"].flatten(2).sum(-1), torch.ones(2, 5))
    for name, values in maps.items():
        assert on_image(values[1], images, 1, SIZES[1]).shape == (5, *SIZES[1]), name
        assert name in ("local", "result") or kind == "LDVC" or values.abs().max() <= 1 + 1e-5
    vectors, labels = labelled_pixels(model, images, [t.gt_classes for t in truth], [t.gt_masks.tensor for t in truth])
    assert len(vectors) == len(labels) > 0 and set(labels.tolist()) <= {k for t in truth for k in t.gt_classes.tolist()}
    texts = class_texts(model, images, vocabulary)
    assert texts.shape == (5, vectors.shape[1])


@torch.no_grad()
def test_models_without_the_pieces_say_so():
    model = randomise(build_model(tiny_cfg(4))).eval()
    images, _ = batch_of(model)
    for function in (similarity_maps, pseudo_masks, mask_embeds):
        with pytest.raises(ValueError, match="Mask2Former .*; expected") as error:
            function(model, images, COLOURS)
        assert "\n" not in str(error.value)
    assert list(mask_opinions(model, images, COLOURS).probs) == ["generator"]
    pixels = tiny_ldvc.make(tiny_ldvc.ldvc_cfg())
    with pytest.raises(ValueError, match="LDVC classifies pixels and has no masks; expected"):
        mask_opinions(pixels, images, COLOURS)
    with pytest.raises(ValueError, match="FCCLIP compares no pixels with texts; expected"):
        similarity_maps(tiny_fcclip.random_fcclip().eval(), images, COLOURS)


def test_best_masks():
    masks = torch.zeros(5, 10, 10, dtype=torch.bool)
    masks[0, :5], masks[1, :5, :9], masks[2, 6:], masks[4, :, :2] = True, True, True, True
    assert best_masks(masks, torch.tensor([0.5, 0.9, 0.1, 1.0, 0.3]), 5) == [1, 4, 2]  # 3 is empty, 0 is like 1
    assert best_masks(masks, torch.tensor([0.5, 0.9, 0.1, 1.0, 0.3]), 1) == [1]
    flat = masks.flatten(1)
    assert float(mask_ious(flat[:1], flat[1:2])) == pytest.approx(0.9) and float(mask_ious(flat[3:4], flat[3:4])) == 0


def test_figures(tmp_path):
    image = torch.zeros(20, 30, 3, dtype=torch.uint8).numpy()
    masks = torch.zeros(2, 20, 30, dtype=torch.bool)
    masks[:, 3:9, 4:20] = True
    figure = proposal_cards(
        image, masks, {"CLIP": torch.rand(2, 3), "ensemble": torch.rand(2, 4)}, ["a", "b", "c"], top=4
    )
    labels = [label.get_text() for label in figure.axes[2].get_yticklabels()]
    assert len(figure.axes) == 6 and set(labels) == {"a", "b", "c", "no object"}
    assert {label.get_text() for label in figure.axes[1].get_yticklabels()} == {"a", "b", "c"}
    figure.savefig(tmp_path / "cards.png", dpi=20)
    maps = heat_maps(image, {"CLIP": torch.rand(2, 20, 30), "result": torch.zeros(2, 20, 30)}, ["a", "b"])
    assert len(maps.axes) == 6 and "0 to 0" in maps.axes[4].get_title()
    scatter = embedding_scatter(
        torch.rand(5, 2), torch.tensor([0, 0, 2, 2, 2]), torch.rand(1, 2), [2], ["a", "b", "c"], title="t"
    )
    assert sorted(text.get_text() for text in scatter.axes[0].texts) == ["a", "c", "c"]
