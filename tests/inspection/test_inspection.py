"""Opinions, maps and embeddings are those of the model's own results, for every kind of model; others say so."""

from functools import cache

import pytest
import torch
from detectron2.modeling import build_model

from ovseg_d2.evaluation.mask_recall import mask_ious
from ovseg_d2.inspection.available import figures_of, require_figure
from ovseg_d2.inspection.embeddings import class_texts, labelled_masks, labelled_pixels, mask_embeds
from ovseg_d2.inspection.figures import embedding_scatter, heat_maps, proposal_cards
from ovseg_d2.inspection.maps import on_image, pseudo_masks, similarity_maps
from ovseg_d2.inspection.masks import best_masks, mask_opinions, true_classes
from tests.helpers import random_input, randomise, tiny_cfg
from tests.modeling import (
    test_dense_clip,
    test_maft_plus,
    tiny_fcclip,
    tiny_fga_seg,
    tiny_hosts,
    tiny_ldvc,
    tiny_maskclippp,
    tiny_mta_clip,
)

SIZES = ((40, 56), (45, 33))
COLOURS = tiny_fcclip.COLOURS


MODELS = {
    "Mask2Former": lambda: randomise(build_model(tiny_cfg(4))),
    "FCCLIP": tiny_fcclip.random_fcclip,
    "MAFTPlus": lambda: tiny_fcclip.random_fcclip(test_maft_plus.plus_cfg()),
    "MAFTPlus without transfer": lambda: tiny_fcclip.random_fcclip(test_maft_plus.plus_cfg(CONTENT_TRANSFER=False)),
    "FrozenCLIP": tiny_hosts.random_host,
    "MAFT": lambda: tiny_hosts.random_host(tiny_hosts.maft_cfg()),
    "MaskCLIPpp": tiny_maskclippp.random_maskclippp,
    "MTACLIP": tiny_mta_clip.random_mta,
    "MTACLIP without alignment": lambda: tiny_mta_clip.random_mta(tiny_mta_clip.mta_cfg(LOSS_WEIGHT=0.0)),
    "LDVC": lambda: tiny_ldvc.make(tiny_ldvc.ldvc_cfg()),
    "DenseCLIP": lambda: test_dense_clip.make(test_dense_clip.dense_cfg()),
    "DenseCLIP without texts": lambda: test_dense_clip.make(test_dense_clip.dense_cfg(TEXT=False)),
    "FGASeg": lambda: tiny_fga_seg.make(tiny_fga_seg.fga_cfg()),
}


@cache
def model_of(kind):
    """Tests leave it as it was."""
    return MODELS[kind]().eval()


def batch_of(model, num_classes=4):
    batch = [random_input(size, num_classes=num_classes, num_masks=3, seed=i) for i, size in enumerate(SIZES)]
    for x in batch:
        x["proposals"] = x["instances"].gt_masks.tensor
    return model.preprocess(batch), [x["instances"] for x in batch]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["FCCLIP", "MAFTPlus", "FrozenCLIP", "MAFT", "MaskCLIPpp", "MTACLIP"])
def test_opinions_and_embeddings_of_masks(kind):
    model = model_of(kind)
    images, truth = batch_of(model)
    opinions = mask_opinions(model, images, COLOURS)
    final = model.predict(images, COLOURS)
    expected = final.class_logits.softmax(-1) if final.class_probs is None else final.class_probs
    last = list(opinions.probs.values())[-1]
    torch.testing.assert_close(last[..., :4], expected[..., :4], rtol=1e-4, atol=1e-6)
    assert set(opinions.probs) <= {"generator", "CLIP", "ensemble"}
    assert kind not in ("FCCLIP", "MAFTPlus") or list(opinions.probs) == ["generator", "CLIP", "ensemble"]
    assert opinions.masks(1, (45, 33)).shape == (last.shape[1], 45, 33)
    embeds = mask_embeds(model, images, COLOURS)
    assert embeds.shape[:2] == last.shape[:2]
    texts = class_texts(model, images, COLOURS)
    assert texts.shape == (4, embeds.shape[-1])
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(4))
    if kind == "MAFTPlus":  # the texts are those that know the images, not the plain ones
        bias = model.content_transfer.norm.bias
        before = bias.clone()
        bias.fill_(50.0)
        moved = class_texts(model, images, COLOURS)
        bias.copy_(before)
        assert (moved @ moved.T).min() > 0.98 and not torch.allclose(moved, texts, atol=0.1)
    # The model's own masks as the truth: all of them are found, in their order.
    masks = [opinions.masks(row, size) for row, size in enumerate(SIZES)]
    full = [one.flatten(1).any(1) & opinions.valid[row] for row, one in enumerate(masks)]
    kept = [one[rows] for one, rows in zip(masks, full, strict=True)]
    vectors, labels = labelled_masks(
        model, images, COLOURS, [torch.zeros(len(m), dtype=torch.int64) for m in kept], kept
    )
    assert len(vectors) == len(labels) == sum(map(len, kept))
    assert kind == "MTACLIP" or len(labels) > 0
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
@pytest.mark.parametrize("text", [True, False], ids=["texts", "plain"])
def test_maps_of_a_closed_vocabulary(text):
    model = model_of("DenseCLIP" if text else "DenseCLIP without texts")
    images, truth = batch_of(model, 5)
    vocabulary = random_input((8, 8), num_classes=5, num_masks=0)["vocabulary"]
    maps = similarity_maps(model, images, vocabulary)
    assert list(maps) == (["pixel-text scores", "result"] if text else ["result"])
    torch.testing.assert_close(maps["result"].sum(1), torch.ones_like(maps["result"][:, 0]))
    with pytest.raises(ValueError, match="4 classes .*; DenseCLIP's vocabulary is closed"):
        similarity_maps(model, images, COLOURS)
    annotation = [t.gt_classes for t in truth], [t.gt_masks.tensor for t in truth]
    if text:
        vectors, labels = labelled_pixels(model, images, *annotation)
        assert len(vectors) == len(labels) > 0
        assert class_texts(model, images, vocabulary).shape == (5, vectors.shape[1])
    else:
        with pytest.raises(ValueError, match="DenseCLIP has no pixels among texts"):
            labelled_pixels(model, images, *annotation)
        assert class_texts(model, images, vocabulary).shape == (0, model.clip.embed_dim)


@torch.no_grad()
def test_maps_of_texts_that_know_the_image():
    model = model_of("MAFTPlus")
    images, _ = batch_of(model)
    maps = similarity_maps(model, images, COLOURS)
    assert list(maps) == ["CLIP", "texts of the image"]
    assert maps["CLIP"].shape == maps["texts of the image"].shape and maps["CLIP"].abs().max() <= 1 + 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_the_figures_of_a_model_are_those_that_can_be_made(kind):
    model = model_of(kind)
    vocabulary = random_input((8, 8), num_classes=5, num_masks=0)["vocabulary"]
    vocabulary = vocabulary if kind.startswith(("LDVC", "DenseCLIP", "FGASeg")) else COLOURS
    images, truth = batch_of(model)
    annotation = [t.gt_classes for t in truth], [t.gt_masks.tensor for t in truth]
    figures = {
        "cards": lambda: mask_opinions(model, images, vocabulary),
        "similarity": lambda: similarity_maps(model, images, vocabulary),
        "pseudo-masks": lambda: pseudo_masks(model, images, vocabulary),
        "embeddings --points masks": lambda: mask_embeds(model, images, vocabulary),
        "embeddings --points pixels": lambda: labelled_pixels(model, images, *annotation),
    }
    assert figures_of(model)
    for name, make in figures.items():
        if name in figures_of(model):
            require_figure(model, name)
            make()
        else:
            with pytest.raises(ValueError, match=f"^--figure {name}: {kind.split()[0]}, .* no such figure; it has ."):
                require_figure(model, name)
            with pytest.raises(ValueError, match="; expected"):
                make()


@torch.no_grad()
def test_models_without_the_pieces_say_so():
    model = model_of("Mask2Former")
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
        similarity_maps(model_of("FCCLIP"), images, COLOURS)


def test_best_masks():
    masks = torch.zeros(5, 10, 10, dtype=torch.bool)
    masks[0, :5], masks[1, :5, :9], masks[2, 6:], masks[4, :, :2] = True, True, True, True
    assert best_masks(masks, torch.tensor([0.5, 0.9, 0.1, 1.0, 0.3]), 5) == [1, 4, 2]  # 3 is empty, 0 is like 1
    assert best_masks(masks, torch.tensor([0.5, 0.9, 0.1, 1.0, 0.3]), 1) == [1]
    flat = masks.flatten(1)
    assert float(mask_ious(flat[:1], flat[1:2])) == pytest.approx(0.9) and float(mask_ious(flat[3:4], flat[3:4])) == 0


def test_true_classes():
    truth = torch.zeros(2, 10, 10, dtype=torch.bool)
    truth[0, :5], truth[1, 5:] = True, True
    masks = torch.zeros(3, 10, 10, dtype=torch.bool)
    masks[0, 5:9], masks[1, :, :3], masks[2, :4] = True, True, True
    assert true_classes(masks, torch.tensor([7, 4]), truth).tolist() == [4, -1, 7]
    assert true_classes(masks, torch.zeros(0), torch.zeros(0, 10, 10)).tolist() == [-1, -1, -1]


def test_cards_say_right_and_wrong():
    image = torch.zeros(20, 30, 3, dtype=torch.uint8).numpy()
    masks = torch.zeros(3, 20, 30, dtype=torch.bool)
    masks[:, 3:9, 4:20] = True
    probs = torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.3, 0.5]])
    options = {"truth": [0, 1, -1], "unseen": {1}}
    figure = proposal_cards(image, masks, {"CLIP": probs}, ["a", "b", "c"], top=2, **options)
    assert len(figure.axes) == 8  # two cards a row
    (first, _), (wrong, right), (best, _) = ([bar.get_facecolor() for bar in figure.axes[i].patches] for i in (1, 3, 5))
    assert first == right and len({first, wrong, best}) == 3
    assert [label.get_text() for label in figure.axes[3].get_yticklabels()] == ["a", "b *"]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["right", "best, but wrong", "best, not annotated", "* unseen in training"]


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
    kinds = {"CLIP": torch.rand(2, 20, 30), "result": torch.zeros(2, 20, 30)}
    maps = heat_maps(image, kinds, ["a", "b"], outlines=[masks[0], None])
    assert [axis.get_title() for axis in maps.axes] == ["", "a", "b", "", ""] and maps.axes[3].get_ylabel() == "result"
    assert maps.axes[3].get_xlabel() == "0 to 0" and [len(axis.collections) for axis in maps.axes] == [0, 1, 0, 1, 0]
    scatter = embedding_scatter(
        torch.rand(5, 2), torch.tensor([0, 0, 2, 2, 2]), torch.rand(1, 2), [2], ["a", "b", "c"], title="t"
    )
    assert sorted(text.get_text() for text in scatter.axes[0].texts) == ["a", "c", "c"]
