"""Ensembles of the hosts, against the formulas of their papers written class by class."""

import pytest
import torch

from ovseg_d2.modeling.mask_classification.host_ensemble import NAMES, HostEnsemble, calibrated

SEEN = torch.tensor([True, False, True, True, False])
CLIP = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)) * 2
GENERATOR = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(1)) * 2


def expected_score(name, weight, ap, ac, seen):
    """One score of a mask that CLIP has seen, out of both probabilities of one class."""
    if name == "none" or (weight == 0 and not name.startswith("zegformer")):
        return ac
    if name == "zsseg":
        return ap**weight * ac ** (1 - weight) if seen else ap ** (1 - weight) * ac**weight
    if name == "maft":
        return ap**weight * ac ** (1 - weight) if seen else ac**weight
    if name == "ovseg":
        return ap ** (1 - weight) * ac**weight
    if name == "zegformer":
        return ap ** (2 / 3) * ac ** (1 / 3) if seen else ap ** (1 / 3) * ac ** (2 / 3)
    if name == "zegformer_all":
        return ap ** (1 / 3) * ac ** (2 / 3)
    return ac


@pytest.mark.parametrize("weight", [0.7, 0.0, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_formulas(name, weight):
    found = HostEnsemble(name=name, weight=weight)(CLIP, SEEN, proposal_logits=GENERATOR)
    assert found.shape == CLIP.shape
    for n in range(2):
        for q in range(6):
            ap, ac = GENERATOR[n, q].softmax(-1), CLIP[n, q].softmax(-1)
            if name.startswith("zegformer"):
                ac = torch.cat([CLIP[n, q], GENERATOR[n, q, -1:]]).softmax(-1)[:-1]
            mean = ac[SEEN].mean()
            for k in range(5):
                clip_says = mean if name == "zegformer" and SEEN[k] else ac[k]
                expected = expected_score(name, weight, ap[k], clip_says, bool(SEEN[k]))
                torch.testing.assert_close(found[n, q, k], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_masks_that_clip_has_not_seen(name):
    """Their embeddings are zeros or nonsense; no such row changes another, and none is sure of a class by it."""
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 2] = valid[1, 5] = False
    ensemble = HostEnsemble(name=name, weight=0.6)
    whole = ensemble(CLIP, SEEN, proposal_logits=GENERATOR)
    part = ensemble(CLIP, SEEN, proposal_logits=GENERATOR, valid=valid)
    torch.testing.assert_close(part[valid], whole[valid])
    ap = GENERATOR.softmax(-1)[..., :-1][~valid]
    if name in ("zsseg", "maft", "ovseg"):
        power = torch.where(SEEN, 0.4 if name == "ovseg" else 0.6, 0.4)
        torch.testing.assert_close(part[~valid], ap**power)
    else:
        assert not part[~valid].any()


@pytest.mark.parametrize("name", ["zsseg", "maft", "ovseg"])
def test_where_clip_decides_alone_an_empty_mask_says_nothing(name):
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 2] = False
    ensemble = HostEnsemble(name=name, weight=0.7, weight_of={"there": 0.0})
    found = ensemble(CLIP, SEEN, proposal_logits=GENERATOR, valid=valid, dataset_names=["there", None])
    assert not found[0, 2].any()
    torch.testing.assert_close(found[0][valid[0]], CLIP[0].softmax(-1)[valid[0]])
    alone = HostEnsemble(name=name, weight=0.7)(CLIP, SEEN, proposal_logits=GENERATOR)
    torch.testing.assert_close(found[1], alone[1])


def test_half_precision_is_summed_in_full():
    found = HostEnsemble(name="zsseg")(CLIP.half(), SEEN, proposal_logits=GENERATOR.half())
    assert found.dtype == torch.float32 and found.isfinite().all()


def test_calibration():
    scores = torch.rand(5, 3, 4)
    found = calibrated(scores, SEEN, 0.25)
    torch.testing.assert_close(found[SEEN], scores[SEEN] - 0.25)
    assert torch.equal(found[~SEEN], scores[~SEEN])


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"none"}))
def test_generators_without_classes(name):
    with pytest.raises(ValueError, match=f"ENSEMBLE.NAME is '{name}', but the mask generator has no classes"):
        HostEnsemble(name=name)(CLIP, SEEN)
    torch.testing.assert_close(HostEnsemble(name="none")(CLIP, SEEN), CLIP.softmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "zseg"}, "ENSEMBLE.NAME is 'zseg'; allowed are none, zsseg, ovseg"),
        ({"name": "zsseg", "weight": -0.1}, "ENSEMBLE.LAMBDA is -0.1; expected a number from 0 to 1"),
        ({"name": "zsseg", "weight_of": {"voc": 2.0}}, "ENSEMBLE.LAMBDA_OF voc is 2.0; expected a number"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        HostEnsemble(**options)
