"""The Mask2Former model: training, evaluation, odd inputs, public checkpoints."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Instances

from ovseg_d2.checkpoint.convert import convert_state_dict
from ovseg_d2.structures import Vocabulary
from tests.helpers import numbered_vocabulary, random_input, randomise, tiny_cfg


@pytest.fixture(scope="module")
def model():
    return randomise(build_model(tiny_cfg()))


def inputs(*sizes, num_classes=5, num_masks=3):
    return [random_input(size, num_classes=num_classes, num_masks=num_masks, seed=i) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("num_masks", [3, 0], ids=["targets", "no targets"])
def test_training_reaches_every_parameter(model, num_masks):
    model.train().zero_grad()
    losses = model(inputs((33, 70), (64, 41), num_masks=num_masks))
    assert len(losses) == 9 and all(loss.isfinite() and loss.dim() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_training_steps_lower_the_loss():
    torch.manual_seed(0)
    model = build_model(tiny_cfg()).train()
    batch = inputs((64, 64), (64, 48))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    totals = []
    for _ in range(25):
        loss = sum(model(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert sum(totals[-5:]) < 0.8 * sum(totals[:5])


@torch.no_grad()
def test_results_have_the_asked_sizes(model):
    batch = inputs((33, 70), (64, 41))
    batch[0] |= {"height": 50, "width": 99}
    for x, result in zip(batch, model.eval()(batch), strict=True):
        size = (x["height"], x["width"])
        assert result["sem_seg"].shape == (5, *size)
        ids, segments = result["panoptic_seg"]
        assert ids.shape == size and sorted(set(ids.unique().tolist()) - {0}) == [s["id"] for s in segments]
        assert isinstance(result["instances"], Instances) and result["instances"].pred_masks.shape[1:] == size


@torch.no_grad()
@pytest.mark.parametrize("task", ["semantic", "panoptic", "instance"])
def test_only_the_tasks_that_are_on(task):
    model = build_model(tiny_cfg(tasks=[task])).eval()
    key = {"semantic": "sem_seg", "panoptic": "panoptic_seg", "instance": "instances"}[task]
    assert set(model(inputs((40, 40)))[0]) == {key}


@torch.no_grad()
def test_earlier_layers_predict_no_classes_in_evaluation(model):
    """Nobody asks for them, and masks at the size of images take the most memory of all."""
    calls, outputs = [], []
    decoder = model.proposals.mask_decoder
    hooks = [
        decoder.class_embed.register_forward_hook(lambda *_: calls.append(1)),
        decoder.register_forward_hook(lambda module, args, output: outputs.append(output)),
    ]
    model.eval()(inputs((64, 41)))
    assert len(calls) == 1 and outputs[0].aux == [] and outputs[0].class_logits is not None
    model.train()(inputs((64, 41)))
    assert len(calls) == 2 + len(decoder.layers) and len(outputs[1].aux) == len(decoder.layers)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_batch_equals_single(model):
    batch = inputs((64, 40), (64, 40))
    together = model.eval()(batch)
    for x, result in zip(batch, together, strict=True):
        torch.testing.assert_close(result["sem_seg"], model([x])[0]["sem_seg"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_permuted_classes_permute_the_results(model):
    batch = inputs((48, 64))
    before = model.eval()(batch)[0]["sem_seg"]
    order = torch.tensor([3, 1, 4, 0, 2, 5])
    head = model.proposals.mask_decoder.class_embed
    weights = [head.weight.clone(), head.bias.clone()]
    head.weight.copy_(weights[0][order])
    head.bias.copy_(weights[1][order])
    torch.testing.assert_close(model(batch)[0]["sem_seg"], before[order[:-1]])
    head.weight.copy_(weights[0])
    head.bias.copy_(weights[1])


@torch.no_grad()
def test_one_class():
    model = build_model(tiny_cfg(num_classes=1)).eval()
    result = model(inputs((64, 32), num_classes=1))[0]
    assert result["sem_seg"].shape == (1, 64, 32)


@torch.no_grad()
def test_two_vocabularies_in_one_batch(model):
    """Which classes are things is a property of the input's vocabulary, not of the model."""
    batch = inputs((48, 48), (48, 48))
    batch[1]["image"] = batch[0]["image"]
    batch[0]["vocabulary"] = numbered_vocabulary(5, 5)
    batch[1]["vocabulary"] = Vocabulary(names=tuple("abcde"), is_thing=(False,) * 5)
    things, stuff = model.eval()(batch)
    assert len(things["instances"]) > 0 and len(stuff["instances"]) == 0
    torch.testing.assert_close(things["sem_seg"], stuff["sem_seg"])


def test_bad_inputs(model):
    batch = inputs((32, 32))
    with pytest.raises(ValueError, match="vocabulary has 7 classes.*fixed to the 5"):
        model.eval()([batch[0] | {"vocabulary": numbered_vocabulary(7, 7)}])
    del batch[0]["vocabulary"]
    with pytest.raises(ValueError, match="no class names"):
        model([batch[0]])
    del batch[0]["instances"]
    with pytest.raises(ValueError, match="no 'instances'"):
        model.train()(batch)
    cfg = tiny_cfg()
    cfg.MODEL.OVSEG.PROPOSALS.NAME = "Mask3Former"
    with pytest.raises(ValueError, match="PROPOSALS.NAME.*Mask3Former.*Mask2FormerProposals"):
        build_model(cfg)
    cfg = tiny_cfg()
    cfg.MODEL.OVSEG.PROPOSALS.IN_FEATURES = ["res2", "res9"]
    with pytest.raises(ValueError, match="IN_FEATURES.*res9"):
        build_model(cfg)


def to_public_names(state_dict):
    """The public Mask2Former's names, written down independently of the conversion."""
    renamed = {"criterion.empty_weight": torch.ones(6)}
    for key, value in state_dict.items():
        key = key.replace("proposals.backbone.", "backbone.")
        if key.startswith("proposals.pixel_decoder."):
            key = key.replace("proposals.pixel_decoder.", "sem_seg_head.pixel_decoder.")
            key = key.replace("decoder.level_embed", "decoder.transformer.level_embed")
            key = key.replace("decoder.encoder.", "decoder.transformer.encoder.layers.")
            key = key.replace("lateral.0", "adapter_1").replace("output.0", "layer_1")
        if key.startswith("proposals.mask_decoder."):
            key = key.replace("proposals.mask_decoder.", "sem_seg_head.predictor.")
            parts = key.split(".")
            if parts[2] == "layers":
                number, block, rest = parts[3], parts[4], ".".join(parts[5:])
                name = {"self_attn": "self_attention", "cross_attn": "cross_attention", "ffn": "ffn"}[block]
                inner = {"self_attn": "self_attn", "cross_attn": "multihead_attn", "ffn": ""}[block]
                rest = rest.replace("attn.", f"{inner}.", 1) if rest.startswith("attn.") else rest
                key = f"sem_seg_head.predictor.transformer_{name}_layers.{number}.{rest}"
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("layout", ["current", "early"])
def test_public_names_load(model, layout):
    public = to_public_names(model.state_dict())
    assert not any("proposals" in key for key in public)
    if layout == "early":
        public = {
            key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query"): value
            for key, value in public.items()
        }
    converted, message = convert_state_dict(public)
    assert "public Mask2Former" in message and "1 without counterpart dropped" in message
    fresh = build_model(tiny_cfg())
    fresh.load_state_dict(converted, strict=True)
    batch = inputs((40, 56))
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(batch)[0]["sem_seg"], model.eval()(batch)[0]["sem_seg"])


def test_own_names_are_left_alone(model):
    converted, message = convert_state_dict(model.state_dict())
    assert converted.keys() == model.state_dict().keys() and "as they are" in message
