"""The trained files that ship with the package, and the tool that puts them there."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from detectron2.utils.file_io import PathManager
from safetensors.torch import load_file

from ovseg_d2.data.datasets.ovshapes import CLASS_NAMES
from ovseg_d2.data.datasets.ovshapes_captions import zero_shot_image
from ovseg_d2.data.datasets.ovshapes_scene import NUM_THINGS
from ovseg_d2.model_zoo import FOLDER
from ovseg_d2.modeling.clip.build import build_clip, clip_tokenizer, load_clip_pretrained
from ovseg_d2.modeling.clip.preprocess import normalise_image

TOOLS = Path(__file__).resolve().parents[1] / "tools"
CLIPS = ("OVShapes-RN", "OVShapes-ViT")


@pytest.fixture()
def pack_zoo(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    sys.modules.pop("pack_zoo", None)
    import pack_zoo

    return pack_zoo


def test_paths_of_the_zoo():
    assert Path(PathManager.get_local_path("model_zoo://OVShapes-RN.safetensors")) == FOLDER / "OVShapes-RN.safetensors"
    with pytest.raises(FileNotFoundError, match=r"model_zoo://none.pth: not in .* there are OVShapes-RN.safetensors"):
        PathManager.get_local_path("model_zoo://none.pth")


def test_sums_and_sizes():
    sums = dict(reversed(line.split()) for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    files = sorted(FOLDER.glob("*.safetensors"))
    assert set(sums) == {file.name for file in files} >= {f"{name}.safetensors" for name in CLIPS}
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() == sums[file.name]
    assert sum((FOLDER / f"{name}.safetensors").stat().st_size for name in CLIPS) <= 16 * 2**20
    assert (FOLDER / "ovshapes_proposals.safetensors").stat().st_size <= 12 * 2**20


@pytest.mark.parametrize("name, least", [("OVShapes-RN", 0.75), ("OVShapes-ViT", 0.5)])
def test_clips_know_the_names(name, least):
    """A sanity check on few pictures; tools/evaluate_tiny_clip.py measures."""
    clip = build_clip(name).eval()
    load_clip_pretrained(clip, name, "ovshapes")
    examples = [zero_shot_image(i, 128) for i in range(40)]
    images = torch.stack([torch.tensor(example.image).permute(2, 0, 1) for example in examples])
    tokens = clip_tokenizer(name)([f"a photo of a {thing}." for thing in CLASS_NAMES[:NUM_THINGS]])
    with torch.no_grad():
        text = torch.nn.functional.normalize(clip.text(tokens), dim=-1)
        guess = (clip.visual(normalise_image(images)).image_embeds @ text.T).argmax(-1)
    right = guess == torch.tensor([example.class_ids[0] for example in examples])
    assert right.float().mean() >= least


def test_packing_keeps_the_generator(pack_zoo, tmp_path):
    model = {
        "proposals.pixel_decoder.weight": torch.randn(3, 2),
        "proposals.mask_decoder.class_embed.logit_scale": torch.tensor(1.0),
        "clip.logit_scale": torch.tensor(2.0),
    }
    torch.save({"model": model}, tmp_path / "model.pth")
    pack_zoo.pack_proposals(tmp_path / "model.pth", tmp_path / "ovshapes_proposals.safetensors")
    packed = load_file(tmp_path / "ovshapes_proposals.safetensors")
    assert set(packed) == {"proposals.pixel_decoder.weight"}
    assert packed["proposals.pixel_decoder.weight"].dtype == torch.float16
    pack_zoo.write_sums(tmp_path)
    assert (tmp_path / "SHA256SUMS").read_text().endswith("  ovshapes_proposals.safetensors\n")

    torch.save({"model": {"clip.logit_scale": torch.tensor(2.0)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no tensor below 'proposals.'"):
        pack_zoo.pack_proposals(tmp_path / "other.pth", tmp_path / "x.safetensors")
