"""Parameter groups, learning rate factors, gradient clipping."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from ovseg_d2.engine.optimizer import build_gradient_clipper, build_optimizer
from ovseg_d2.modeling.clip.eva import ClipEva
from tests.helpers import tiny_cfg
from tests.modeling.clip.test_trainable import convnext_encoder, resnet_encoder, text_encoder
from tests.modeling.clip.tiny_vit import eva_tower


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.ModuleDict({"norm": nn.LayerNorm(4), "query": nn.Embedding(2, 4), "out": nn.Linear(4, 2)})
        self.relative_position_bias_table = nn.Parameter(torch.zeros(3))
        self.level_embed = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.tied = self.head["out"]


@pytest.fixture
def cfg():
    cfg = tiny_cfg()
    cfg.SOLVER.BASE_LR = 1.0
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM, cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.05, 0.01, 0.02
    cfg.SOLVER.LR_FACTORS = [["backbone", 0.1], ["head", 2.0], ["head.query", 3.0]]
    return cfg


def settings(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    found = {names[p]: (group["initial_lr" if "initial_lr" in group else "lr"], group["weight_decay"])
             for group in groups for p in group["params"]}  # fmt: skip
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) == len(groups)
    return found


def test_groups(cfg):
    model = Model()
    assert settings(model, build_optimizer(cfg, model)) == {
        "backbone.0.weight": (0.1, 0.05),
        "backbone.0.bias": (0.1, 0.05),  # biases are decayed, as in the public Mask2Former
        "backbone.1.weight": (0.1, 0.01),
        "backbone.1.bias": (0.1, 0.01),
        "head.norm.weight": (2.0, 0.01),
        "head.norm.bias": (2.0, 0.01),
        "head.query.weight": (3.0, 0.02),
        "head.out.weight": (2.0, 0.05),
        "head.out.bias": (2.0, 0.05),
        "relative_position_bias_table": (1.0, 0.0),
        "level_embed": (1.0, 0.05),
    }


def test_mask2former_groups():
    cfg = tiny_cfg()
    model = build_model(cfg)
    found = settings(model, build_optimizer(cfg, model))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    base, decay = cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY
    assert found["proposals.backbone.res2.0.conv1.weight"] == (0.1 * base, decay)
    assert found["proposals.pixel_decoder.level_embed"] == (base, decay)
    assert found["proposals.mask_decoder.level_embed.weight"] == (base, 0.0)
    assert found["proposals.mask_decoder.decoder_norm.bias"] == (base, 0.0)


def decayed(encoder, cfg):
    """Names of the parameters of ``encoder`` that are decayed, and of those that are not."""
    cfg.SOLVER.LR_FACTORS, cfg.SOLVER.WEIGHT_DECAY_NORM, cfg.SOLVER.WEIGHT_DECAY_EMBED = [], 0.0, 0.0
    found = settings(encoder, build_optimizer(cfg, encoder))
    assert {decay for _, decay in found.values()} == {0.0, cfg.SOLVER.WEIGHT_DECAY}
    return tuple({name for name, (_, d) in found.items() if bool(d) == flag} for flag in (True, False))


def test_weight_decay_of_clips(cfg):
    """What the public MaskCLIP++ decays and what it does not."""
    with_decay, without = decayed(resnet_encoder(), cfg)
    assert "tower.attnpool.positional_embedding" in with_decay and "tower.bn1.bias" in without
    with_decay, without = decayed(ClipEva(eva_tower(), mask_mode="maskclippp"), cfg)
    assert {"mask_logit_scale", "tower.trunk.blocks.0.attn.q_proj.bias", "tower.trunk.head.bias"} <= with_decay
    assert {"tower.trunk.pos_embed", "tower.trunk.cls_token", "tower.trunk.blocks.0.attn.norm.weight"} <= without
    with_decay, without = decayed(convnext_encoder(), cfg)
    assert "tower.trunk.stages.0.blocks.0.gamma" in with_decay and "tower.trunk.head.norm.weight" in without
    with_decay, without = decayed(text_encoder(), cfg)
    assert {"text_projection", "transformer.resblocks.0.attn.in_proj_bias"} <= with_decay
    assert {"positional_embedding", "token_embedding.weight", "ln_final.bias"} <= without


def test_optimizers(cfg):
    cfg.SOLVER.OPTIMIZER = "SGD"
    assert isinstance(build_optimizer(cfg, Model()), torch.optim.SGD)
    cfg.SOLVER.OPTIMIZER = "LAMB"
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER is 'LAMB', allowed are ADAMW, SGD"):
        build_optimizer(cfg, Model())


@pytest.mark.parametrize(
    ("factors", "message"),
    [([["heads", 0.1]], "no parameter lies under 'heads'"), ([["head"]], "not a pair"), ([[1, 2]], "not a pair")],
)
def test_factors_that_would_do_nothing(cfg, factors, message):
    cfg.SOLVER.LR_FACTORS = factors
    with pytest.raises(ValueError, match=message):
        build_optimizer(cfg, Model())


def test_default_factor_suits_models_without_proposals(cfg):
    cfg.SOLVER.LR_FACTORS = tiny_cfg().SOLVER.LR_FACTORS
    build_optimizer(cfg, Model())


def test_nothing_to_train(cfg):
    cfg.SOLVER.LR_FACTORS = []
    with pytest.raises(ValueError, match="nothing to train"):
        build_optimizer(cfg, nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("full_model", [[0.6, 0.0], [0.0, 0.8]]),  # (3, 0), (0, 4) have the common norm 5
        ("norm", [[1.0, 0.0], [0.0, 1.0]]),
        ("value", [[1.0, 0.0], [0.0, 1.0]]),
    ],
)
def test_clipping(cfg, kind, expected):
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE = True, kind, 1.0, 2.0
    norm = build_gradient_clipper(cfg)(parameters)
    assert kind != "full_model" or float(norm) == pytest.approx(5.0)
    torch.testing.assert_close(torch.stack([p.grad for p in parameters]), torch.tensor(expected), atol=1e-4, rtol=0)


def test_no_clipping(cfg):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    assert build_gradient_clipper(cfg) is None
