"""MaskCLIP++'s similarities: what they are made of, synonyms, batches. Their values are in the parity."""

import pytest
import torch
from detectron2.config import get_cfg
from torch.nn import functional as F

from ovseg_d2.config import add_ovseg_config
from ovseg_d2.modeling.mask_classification.build_similarity import SIMILARITIES, build_similarity
from ovseg_d2.modeling.mask_classification.parameterized_similarity import CosineSimilarity
from ovseg_d2.modeling.mask_classification.similarity import cosine_logits
from ovseg_d2.modeling.text_classifier import averaged
from ovseg_d2.structures import TextClasses
from tests.helpers import randomise

DIM, PROMPTS = 16, 3


def text(class_ids=(0, 1, 1, 2), prompts=PROMPTS):
    generator = torch.Generator().manual_seed(1)
    embeds = F.normalize(torch.randn(len(class_ids), prompts, DIM, generator=generator), dim=-1)
    every = torch.ones(class_ids[-1] + 1, dtype=torch.bool)
    return TextClasses(embeds, torch.tensor(class_ids), every, every)


def similarity_of(name):
    cfg = get_cfg()
    add_ovseg_config(cfg)
    cfg.MODEL.OVSEG.MASKCLIPPP.SIMILARITY = name
    return randomise(build_similarity(cfg, dim=DIM, num_prompts=PROMPTS)).eval()


@pytest.fixture
def masks():
    return torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def dense():
    return torch.randn(2, DIM, 3, 4, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", SIMILARITIES)
def test_classes_are_their_best_synonyms(name, masks, dense):
    module = similarity_of(name)
    logits = module(masks, text(), scale=7.0, dense=dense)
    entries = module(masks, text((0, 1, 2, 3)), scale=7.0, dense=dense)
    assert logits.shape == (2, 5, 3)
    torch.testing.assert_close(logits, torch.stack([entries[..., 0], entries[..., 1:3].amax(-1), entries[..., 3]], -1))
    torch.testing.assert_close(logits[1:], module(masks[1:], text(), scale=7.0, dense=dense[1:]))
    assert module(masks[:, :0], text(), dense=dense).shape == (2, 0, 3)


def test_cosines_are_clips_own(masks):
    one = averaged(text())
    torch.testing.assert_close(CosineSimilarity()(masks, one, scale=5.0), cosine_logits(masks, one, torch.tensor(5.0)))


def test_linear_maps_go_one_after_the_other(masks):
    module, classes = similarity_of("linear"), text((0, 1, 2, 3))
    cosines = 7.0 * torch.einsum("nqd,epd->nqep", F.normalize(masks, dim=-1), classes.embeds)
    expected = module.reduce(module.expand(cosines))[..., 0]
    torch.testing.assert_close(module(masks, classes, scale=7.0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pseudo_text", "pseudo_text_alone"])
def test_pseudo_texts_see_the_image(name, masks, dense):
    module = similarity_of(name)
    logits = module(masks, text(), dense=dense)
    assert not torch.allclose(logits, module(masks, text(), dense=dense.flip(1)))
    alone = similarity_of("pseudo_text_alone")
    with torch.no_grad():
        alone.attn.out_proj.weight.zero_()
    assert alone(masks, text(), dense=dense).std(-1).max() < 1e-5  # nothing is left of the texts
