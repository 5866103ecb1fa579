"""CLIP models by name, and where their weights come from; no network is used."""

from __future__ import annotations

import hashlib
import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from detectron2.config import get_cfg
from safetensors.torch import load_file, save_file
from torch import nn

from ovseg_d2.config import add_ovseg_config
from ovseg_d2.modeling.clip import architectures, weights
from ovseg_d2.modeling.clip.architectures import model_config
from ovseg_d2.modeling.clip.build import build_clip, build_clip_from_config, clip_tokenizer, load_clip_pretrained
from ovseg_d2.modeling.clip.convnext import ClipConvNeXt
from ovseg_d2.modeling.clip.eva import ClipEva
from ovseg_d2.modeling.clip.openai import read_torchscript
from ovseg_d2.modeling.clip.resnet import ClipResNet
from ovseg_d2.modeling.clip.state_dict import clip_state_dict_from_open_clip
from ovseg_d2.modeling.clip.trainable import apply_policy
from ovseg_d2.modeling.clip.vit import ClipViT
from tests.modeling.clip.tiny_clip import RESNET, TEXT, images, random_open_clip, write_config

QUICK_RESNET = {**RESNET, "quick_gelu": True}
EVA = {
    "embed_dim": 12,
    "vision_cfg": {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": None,
                   "image_size": 56},
    "text_cfg": TEXT,
    "custom_text": True,
}  # fmt: skip
VIT = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": TEXT,
}
TOKENS = nn.functional.pad(torch.tensor([[38, 5, 39, 0], [38, 6, 7, 39]]), (0, 8))

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.trace")


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails, as it does without a network."""

    def fail(*args: Any, **kwargs: Any) -> str:
        raise FileNotFoundError("Failed to download file")

    for name in ("download_pretrained_from_url", "download_pretrained_from_hf"):
        monkeypatch.setattr(open_clip.pretrained, name, fail)
    monkeypatch.setattr(open_clip.factory, "download_pretrained_from_hf", fail)


@pytest.fixture
def zoo(tmp_path, monkeypatch) -> Path:
    """A model zoo with the configurations of the package and weights in half precision."""
    folder = tmp_path / "zoo"
    shutil.copytree(architectures.ZOO, folder, ignore=shutil.ignore_patterns("*.safetensors", "SHA256SUMS"))
    monkeypatch.setattr(architectures, "ZOO", folder)
    monkeypatch.setattr(weights, "ZOO", folder)
    config = model_config("OVShapes-RN")
    config["text_cfg"]["vocab_size"] = clip_tokenizer("OVShapes-RN").vocab_size
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in random_open_clip(config).state_dict().items()
    }
    save_file(half, folder / "OVShapes-RN.safetensors")
    return folder


def open_clip_twin(config: dict[str, Any], seed: int = 3) -> nn.Module:
    return random_open_clip(deepcopy(config), seed)


# ---- architectures


@pytest.mark.parametrize(
    ("name", "kind", "embed_dim"),
    [
        ("RN50-quickgelu", ClipResNet, 1024),
        ("ViT-B-16-quickgelu", ClipViT, 512),
        ("ViT-B/16", ClipViT, 512),
        ("convnext_large_d_320", ClipConvNeXt, 768),
        ("EVA02-B-16", ClipEva, 512),
        ("OVShapes-RN", ClipResNet, 128),
        ("OVShapes-ViT", ClipViT, 128),
    ],
)
def test_names_build_on_the_meta_device(name, kind, embed_dim):
    with torch.device("meta"):
        clip = build_clip(name)
    assert type(clip.visual) is kind and clip.embed_dim == embed_dim
    assert all(parameter.is_meta for parameter in clip.parameters())
    assert clip.text.text_projection.shape[1] == embed_dim


def test_json_files_build(tmp_path):
    clip = build_clip(write_config(tmp_path, VIT), visual_kwargs={"out_layers": ["block0"]})
    assert isinstance(clip.visual, ClipViT) and list(clip.visual.output_shape()) == ["block0"]
    assert build_clip(write_config(tmp_path, VIT), with_text=False).text is None


def test_local_folders_build_and_load(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": VIT, "preprocess_cfg": {}}))
    model = random_vit()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    clip = build_clip(f"local-dir:{tmp_path}").eval()
    assert "open_clip_model" in load_clip_pretrained(clip, f"local-dir:{tmp_path}", "default")
    torch.testing.assert_close(clip.text(TOKENS), model.encode_text(TOKENS))
    assert clip_tokenizer(f"local-dir:{tmp_path}")(["a dog"]).shape == (1, 12)


def test_timm_towers_take_the_image_size_of_the_configuration(tmp_path):
    clip = build_clip(write_config(tmp_path, EVA))
    assert clip.visual.tower.trunk.pos_embed.shape[1] == 1 + (56 // 14) ** 2


def test_random_weights_need_no_file(tmp_path, no_network):
    """Neither CLIP's nor the base weights that a configuration of open_clip can name."""
    config = deepcopy(EVA)
    config["vision_cfg"]["timm_model_pretrained"] = True
    build_clip(write_config(tmp_path, config))


def test_the_zoo_has_its_own_tokenizer():
    tokenizer = clip_tokenizer("OVShapes-RN")
    tokens = tokenizer(["a red star", "x"])
    clip = build_clip("OVShapes-RN")
    assert tokens.shape == (2, 77) and tokens.max() < clip.text.token_embedding.num_embeddings == tokenizer.vocab_size
    assert clip.text(tokens).shape == (2, 128)
    assert clip_tokenizer("RN50")(["a red star"])[0, :5].tolist() == [49406, 320, 736, 1565, 49407]


def test_from_config(tmp_path):
    cfg = get_cfg()
    add_ovseg_config(cfg)
    cfg.MODEL.OVSEG.CLIP.NAME = write_config(tmp_path, RESNET)
    cfg.MODEL.OVSEG.CLIP.TRAINABLE = "full"
    cfg.MODEL.OVSEG.CLIP.USE_CHECKPOINT = True
    clip = build_clip_from_config(cfg, mask_pooling="soft")
    assert clip.visual.use_checkpoint and clip.visual.mask_pooling == "soft"
    trained = {name for name, parameter in clip.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in clip.named_parameters() if name.startswith("visual.")}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RN51", r"no CLIP model 'RN51'; nearest are RN50, .*local-dir"),
        ("ovshapes-rn", r"no CLIP model 'ovshapes-rn'; nearest are OVShapes-RN, OVShapes-ViT"),
        ("", "no CLIP model ''; nearest are "),
        ("nowhere/x.json", "the file nowhere/x.json does not exist"),
        ("local-dir:nowhere", "the file nowhere/open_clip_config.json does not exist"),
        ("local-dir:", "'local-dir:' names nothing"),
        ("hf-hub:a/b", "open_clip_config.json of the Hugging Face repository a/b is not cached"),
        ("coca_ViT-B-32", r"text decoder \(CoCa\), which is not supported"),
        ("roberta-ViT-B-32", r"Hugging Face \(roberta-base\), which is not supported"),
        ("ViT-B-16-SigLIP", "is timm.models.vision_transformer.VisionTransformer; supported are open_clip's"),
    ],
)
def test_bad_names(name, message, no_network):
    with pytest.raises(ValueError, match=rf"^MODEL.OVSEG.CLIP.NAME: .*{message}") as error, torch.device("meta"):
        build_clip(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "tiny.json is not JSON"),
        ("[1]", "embed_dim, vision_cfg, text_cfg missing"),
        ('{"embed_dim": 4, "vision_cfg": {}}', "is no configuration of open_clip: text_cfg missing"),
        (json.dumps({**VIT, "embed_dmi": 3}), "the configuration of .* is wrong: .*embed_dmi"),
        (json.dumps({**VIT, "vision_cfg": {"widht": 4}}), "the configuration of .* is wrong: .*widht"),
    ],
)
def test_broken_configurations(tmp_path, text, message):
    path = tmp_path / "tiny.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^MODEL.OVSEG.CLIP.NAME: .*{message}"):
        build_clip(str(path))


# ---- weights


def random_vit() -> nn.Module:
    return random_open_clip(VIT, seed=3)


@pytest.mark.parametrize("config", [RESNET, VIT], ids=["resnet", "vit"])
def test_loaded_towers_equal_open_clip(tmp_path, config):
    model = open_clip_twin(config)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pt")
    name = write_config(tmp_path, config)
    clip = build_clip(name).eval()
    line = load_clip_pretrained(clip, name, str(tmp_path / "w.pt"))
    assert f"{len(model.state_dict())} tensors" in line and "w.pt" in line
    size = config["vision_cfg"]["image_size"]
    with torch.no_grad():
        embeds = clip.visual(images(2, 3, size, size)).image_embeds
        torch.testing.assert_close(embeds, model.encode_image(images(2, 3, size, size)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(clip.text(TOKENS), model.encode_text(TOKENS), rtol=1e-5, atol=1e-5)
    assert clip.logit_scale == model.logit_scale
    assert {key.split(".")[0] for key in clip.state_dict()} == {"visual", "text", "logit_scale"}


def test_both_layouts_of_open_clip_are_renamed_alike():
    state_dict = random_vit().state_dict()
    custom = {
        name if name.startswith(("visual.", "logit_scale")) else f"text.{name}": tensor
        for name, tensor in state_dict.items()
    }
    ours = clip_state_dict_from_open_clip(state_dict)
    assert clip_state_dict_from_open_clip(custom).keys() == ours.keys()
    assert clip_state_dict_from_open_clip(ours).keys() == ours.keys()
    assert "visual.tower.conv1.weight" in ours and "text.transformer.resblocks.0.ln_1.weight" in ours


def test_image_tower_alone(tmp_path):
    model, name = random_vit(), write_config(tmp_path, VIT)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    clip = build_clip(name, with_text=False)
    load_clip_pretrained(clip, name, str(tmp_path / "w.safetensors"))
    torch.testing.assert_close(clip.visual.tower.conv1.weight, model.visual.conv1.weight)


def test_a_methods_own_parameters_keep_their_values(tmp_path):
    name = write_config(tmp_path, RESNET)
    save_file(open_clip_twin(RESNET).state_dict(), tmp_path / "w.safetensors")
    clip = build_clip(name, visual_kwargs={"mask_pooling": "soft", "mask_logit_scale": -2.0})
    load_clip_pretrained(clip, name, str(tmp_path / "w.safetensors"))
    assert (clip.visual.mask_logit_scale == -2).all()


def test_split_projections_load(tmp_path):
    name, model = write_config(tmp_path, VIT), random_vit()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    clip = build_clip(name).eval()
    apply_policy(clip.visual, "attention_qv")
    load_clip_pretrained(clip, name, str(tmp_path / "w.safetensors"))
    with torch.no_grad():
        embeds = clip.visual(images(2, 3, 32, 32)).image_embeds
        torch.testing.assert_close(embeds, model.encode_image(images(2, 3, 32, 32)), rtol=1e-5, atol=1e-5)


def test_zoo_weights(zoo):
    clip = build_clip("OVShapes-RN")
    file = zoo / "OVShapes-RN.safetensors"
    assert str(file) in load_clip_pretrained(clip, "OVShapes-RN", "ovshapes")
    weight = clip.visual.tower.conv1.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, load_file(file)["visual.conv1.weight"].float())

    sums = zoo / "SHA256SUMS"
    sums.write_text(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n")
    load_clip_pretrained(clip, "OVShapes-RN", "ovshapes")
    sums.write_text(f"{'0' * 64}  {file.name}\n")
    with pytest.raises(ValueError, match="OVShapes-RN.safetensors is damaged"):
        load_clip_pretrained(clip, "OVShapes-RN", "ovshapes")
    with pytest.raises(ValueError, match="OVShapes-ViT.safetensors does not exist; tools/pretrain_tiny_clip.py"):
        weights.find_weights("OVShapes-ViT", "ovshapes")


def test_tags_are_fetched_by_open_clip(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", lambda tag: fetched.append(tag) or "w.bin")
    assert weights.find_weights("ViT-B/32", "LAION2B-s34b_b79k") == Path("w.bin")
    assert fetched[0]["hf_hub"].startswith("laion/CLIP-ViT-B-32-laion2B")
    weights.find_weights("hf-hub:me/model", "default")
    assert fetched[1]["hf_hub"] == "me/model/"


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-32", "laion2b_s34b_b79", "no file and no weights of ViT-B-32; nearest tags are laion2b_s34b_b79k, "),
        ("convnext_large_d_320", "openai", "nearest tags are .*laion2b_s29b_b131k_ft_soup"),
        ("OVShapes-RN", "openai", "no weights of OVShapes-RN; nearest tags are ovshapes"),
        ("RN50", "", "'' is no file and no weights of RN50"),
        ("RN50", "nowhere/w.pt", "the file nowhere/w.pt does not exist"),
        ("RN50", "w.safetensors", "the file w.safetensors does not exist"),
        (
            "ViT-B-32",
            "laion2b_s34b_b79k",
            "not cached and could not be fetched .*; fetch open_clip_pytorch_model.bin of the Hugging Face repository "
            "laion/CLIP-ViT-B-32-laion2B-s34B-b79K .* set MODEL.OVSEG.CLIP.PRETRAINED to its path",
        ),
        ("hf-hub:me/model", "default", "fetch open_clip_pytorch_model.bin of the Hugging Face repository me/model"),
    ],
)
def test_missing_weights(name, pretrained, message, no_network):
    with pytest.raises(ValueError, match=rf"^MODEL.OVSEG.CLIP.PRETRAINED: .*(?:{message})") as error:
        weights.find_weights(name, pretrained)
    assert "\n" not in str(error.value)


def test_missing_weights_of_a_plain_url(no_network, monkeypatch):
    tag = {"url": "https://example.org/rn50.pt"}
    monkeypatch.setattr(open_clip.pretrained, "get_pretrained_cfg", lambda name, tag_name: tag)
    with pytest.raises(ValueError, match="could not be fetched .*; fetch https://example.org/rn50.pt where"):
        weights.find_weights("RN50", "any")


def test_activation_must_fit():
    with pytest.raises(
        ValueError, match="'openai' needs a model with QuickGELU.*set MODEL.OVSEG.CLIP.NAME RN50-quickg"
    ):
        weights.find_weights("RN50", "openai")
    with pytest.raises(ValueError, match="no weights of ViT-B-32-quickgelu"):
        weights.find_weights("ViT-B-32-quickgelu", "laion2b_s34b_b79k")


def test_weights_of_another_architecture(tmp_path):
    name = write_config(tmp_path, VIT)
    state_dict = random_vit().state_dict()
    path = tmp_path / "w.safetensors"

    def load(tensors: dict[str, torch.Tensor]) -> nn.Module:
        save_file(tensors, path)
        clip = build_clip(name)
        load_clip_pretrained(clip, name, str(path))
        return clip

    narrow = {**state_dict, "ln_final.weight": torch.zeros(4), "visual.conv1.weight": torch.zeros(4, 3, 8, 8)}
    with pytest.raises(
        ValueError,
        match=r"w.safetensors: weights of another architecture: 2 tensors of another shape, first "
        r"visual.conv1.weight: \(4, 3, 8, 8\) in the file, \(16, 3, 8, 8\) in the model$",
    ):
        load(narrow)
    fewer = {key: value for key, value in state_dict.items() if not key.startswith("visual.ln_post")}
    with pytest.raises(ValueError, match="2 missing, first visual.ln_post.weight; 1 unexpected, first extra$"):
        load({**fewer, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="missing, first visual.class_embedding"):
        load(open_clip_twin(RESNET).state_dict())
    assert load({**state_dict, "logit_bias": torch.zeros(1), "logit_scale": torch.ones(1)}).logit_scale.shape == ()


# ---- OpenAI's archives


class Scripted(nn.Module):
    """An OpenAI model as far as its file is concerned: weights, and three facts as buffers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, module in model.named_children():
            setattr(self, name, module)
        for name, parameter in model.named_parameters(recurse=False):
            setattr(self, name, nn.Parameter(parameter.half()))
        for name in ("input_resolution", "context_length", "vocab_size"):
            self.register_buffer(name, torch.tensor(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.logit_scale


@pytest.fixture
def archive(tmp_path) -> Path:
    path = tmp_path / "RN-tiny.pt"
    torch.jit.trace(Scripted(open_clip_twin(QUICK_RESNET)), torch.ones(1)).save(str(path))
    return path


def test_openai_archives_are_converted_once(tmp_path, archive, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, name = open_clip_twin(QUICK_RESNET), write_config(tmp_path, QUICK_RESNET)
    clip = build_clip(name).eval()
    load_clip_pretrained(clip, name, str(archive))
    torch.testing.assert_close(clip.visual.tower.conv1.weight, model.visual.conv1.weight)
    torch.testing.assert_close(clip.text.positional_embedding, model.positional_embedding, rtol=1e-3, atol=1e-3)

    (cached,) = (tmp_path / "cache" / "ovseg_d2").iterdir()
    assert load_file(cached).keys() == model.state_dict().keys()
    with monkeypatch.context() as patch:
        patch.setattr(torch.jit, "load", None)
        load_clip_pretrained(clip, name, str(archive))
    # Another archive under the same name is another one.
    torch.jit.trace(Scripted(open_clip_twin(QUICK_RESNET, seed=4)), torch.ones(1)).save(str(archive))
    load_clip_pretrained(clip, name, str(archive))
    other = open_clip_twin(QUICK_RESNET, seed=4)
    torch.testing.assert_close(clip.visual.tower.conv1.weight, other.visual.conv1.weight)
    assert len(list(cached.parent.iterdir())) == 2


def test_openai_archives_need_quick_gelu(tmp_path, archive):
    name = write_config(tmp_path, RESNET)
    with pytest.raises(ValueError, match='RN-tiny.pt needs a model with QuickGELU.*"quick_gelu": true'):
        load_clip_pretrained(build_clip(name), name, str(archive))


def test_openai_archives_load_without_a_cache(tmp_path, archive, caplog):
    (tmp_path / "file").touch()
    assert "visual.conv1.weight" in read_torchscript(archive, tmp_path / "file" / "cache")
    assert "has to be converted again" in caplog.text


def test_broken_archives_are_refused(tmp_path):
    name = write_config(tmp_path, QUICK_RESNET)
    clip = build_clip(name)
    (tmp_path / "w.pt").write_bytes(b"noise")
    with pytest.raises(ValueError, match="w.pt cannot be read"):
        load_clip_pretrained(clip, name, str(tmp_path / "w.pt"))
