"""ProxyCLIP: the equation on numbers, and a tiny vision transformer of timm behind it."""

import pytest
import timm
import torch
from detectron2.modeling import build_model
from torch import nn
from torch.nn import functional as F

from ovseg_d2.checkpoint.io import save_atomic
from ovseg_d2.engine import load_parts
from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from ovseg_d2.modeling.clip.proxy_attention import proxy_attention
from ovseg_d2.modeling.clip.proxy_model import ProxyModel, load_proxy_pretrained
from ovseg_d2.modeling.clip.vit import ClipViT
from tests.helpers import randomise
from tests.modeling.clip.tiny_vit import WIDTH, random_images, vit_tower
from tests.modeling.test_training_free import free_cfg, inputs, make

NAME = "test_vit.r160_in1k"  # timm's own for tests: 16-pixel patches, 6 blocks of width 64


def by_hand(features: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """Row by row, for one image whose grid stays."""
    x = features.flatten(1).T
    x = x / x.norm(dim=1, keepdim=True)
    similarity = x @ x.T
    rows = []
    for i, row in enumerate(similarity):
        logits = gamma * (row - beta * similarity.mean())
        kept = [j for j, logit in enumerate(logits) if logit >= 0 or j == i]
        weights = torch.zeros(len(x))
        weights[kept] = logits[kept].exp() / logits[kept].exp().sum()
        rows.append(weights)
    return torch.stack(rows)


def test_attention():
    features = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    found = proxy_attention(features, (3, 4), beta=1.1, gamma=2.0)
    for one, expected in zip(found, features, strict=True):
        torch.testing.assert_close(one, by_hand(expected, 1.1, 2.0))
    assert (found == 0).any() and (found > 0).float().mean() > 0.1
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 12))


def test_positions_that_look_the_same_see_themselves():
    """Where the whole image is alike, nothing is above its mean."""
    found = proxy_attention(torch.ones(1, 5, 2, 2), (2, 2))
    torch.testing.assert_close(found[0], torch.eye(4))


def test_features_go_to_the_grid_of_clip():
    features = torch.rand(1, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    resized = F.interpolate(features, size=(3, 5), mode="bilinear", align_corners=False)
    torch.testing.assert_close(proxy_attention(features, (3, 5)), proxy_attention(resized, (3, 5)))


@torch.no_grad()
def test_last_block():
    tower, images = vit_tower(), random_images(24, 40)
    weights = torch.rand(2, 15, 15).softmax(-1)
    found = ClipViT(tower, last_block="proxy")(images, proxy=lambda x, grid: weights)
    full = ClipViT(tower)
    entering = full.token_states(images)  # what leaves the last block is not needed, its inputs are
    states = ClipViT(tower, out_layers=[f"block{len(full.blocks) - 2}"], last_block="none").token_states(images)
    x = states.layers[f"block{len(full.blocks) - 2}"][:, 1:]
    block = tower.transformer.resblocks[-1]
    value = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)[..., 2 * WIDTH :]
    dense = tower.ln_post(block.attn.out_proj(weights @ value)) @ tower.proj
    torch.testing.assert_close(found.dense, dense.transpose(1, 2).unflatten(2, (3, 5)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.image_embeds, full.head(entering.last[:, :1])[:, 0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_features_are_those_of_timm():
    proxy = randomise(ProxyModel(name=NAME)).eval()
    picture = 255 * torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_PIXEL_MEAN, CLIP_PIXEL_STD))
    plain = timm.create_model(NAME, pretrained=False, num_classes=0).eval()
    plain.load_state_dict(proxy.model.state_dict())
    own_mean, own_std = (torch.tensor(plain.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = plain.forward_features((picture / 255 - own_mean) / own_std)[:, plain.num_prefix_tokens :]
    found = proxy.features((picture - mean) / std)
    torch.testing.assert_close(found.flatten(2).mT, expected, rtol=1e-3, atol=1e-4)
    # Other sizes, too, and such as are no multiples of its patches.
    assert proxy.features(torch.zeros(1, 3, 48, 70)).shape[-2:] == (3, 4)
    assert proxy(torch.zeros(2, 3, 48, 72), (6, 9)).shape == (2, 54, 54)


def proxy_cfg(**proxy):
    cfg = free_cfg(classify="dense", LAST_BLOCK="proxy")
    cfg.MODEL.OVSEG.TRAINING_FREE.PROXY.NAME = NAME
    for key, value in proxy.items():
        cfg.MODEL.OVSEG.TRAINING_FREE.PROXY[key] = value
    return cfg


@torch.no_grad()
def test_model():
    model = make(proxy_cfg(BETA=0.9))
    assert not any(parameter.requires_grad for parameter in model.proxy.parameters())
    results, turned = model(inputs()), model(inputs()[::-1])[::-1]
    for x, found, other in zip(inputs(), results, turned, strict=True):
        assert found["sem_seg"].shape == (5, x["height"], x["width"]) and found["sem_seg"].std() > 0
        torch.testing.assert_close(found["sem_seg"], other["sem_seg"], atol=1e-4, rtol=1e-3)
    model.proxy.beta = 2.0  # nothing is that like anything else
    assert float((model(inputs())[0]["sem_seg"] - results[0]["sem_seg"]).abs().max()) > 1e-4


def test_other_methods_have_no_proxy():
    assert build_model(free_cfg(classify="dense", LAST_BLOCK="clearclip")).proxy is None


def test_weights(tmp_path):
    """From a file, with DINO's head left out; together with CLIP they are all that an evaluation needs."""
    source = make(proxy_cfg())
    cfg = proxy_cfg(PRETRAINED=str(tmp_path / "dino.pth"))
    save_atomic({**source.proxy.model.state_dict(), "head.weight": torch.zeros(2)}, tmp_path / "dino.pth")
    cfg.MODEL.OVSEG.CLIP.PRETRAINED = str(tmp_path / "clip.pth")
    save_atomic(source.clip.state_dict(), tmp_path / "clip.pth")
    model = build_model(cfg)
    load_parts(model, cfg, strict=True)
    expected = source.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "PROXY.PRETRAINED: the file '.*dino.pth' does not exist; expected a file, or 'timm'"),
        (
            {"head.weight": torch.zeros(3)},
            "dino.pth does not fit test_vit.r160_in1k: .* missing, of another shape or unknown, for example ",
        ),
        ({"norm.weight": torch.zeros(3)}, "does not fit test_vit.r160_in1k"),
    ],
)
def test_wrong_weights(tmp_path, weights, message):
    if weights is not None:
        save_atomic(weights, tmp_path / "dino.pth")
    with pytest.raises(ValueError, match=f"^MODEL.OVSEG.TRAINING_FREE.*{message}") as error:
        load_proxy_pretrained(ProxyModel(name=NAME), str(tmp_path / "dino.pth"))
    assert "\n" not in str(error.value)


def test_weights_that_cannot_be_fetched(monkeypatch):
    proxy, create = ProxyModel(name=NAME), timm.create_model

    def offline(name: str, *, pretrained: bool = False, **options: object) -> nn.Module:
        if pretrained:
            raise OSError("no network")
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"PRETRAINED: timm's weights of test_vit.* could not be fetched \(OSError\)"):
        load_proxy_pretrained(proxy, "timm")


@pytest.mark.parametrize("name", ["vit_base_dinosaur", "resnet18"])
def test_wrong_names(name):
    with pytest.raises(ValueError, match="MODEL.OVSEG.TRAINING_FREE.PROXY.NAME: .*vision transformer"):
        ProxyModel(name=name)
