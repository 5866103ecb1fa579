"""tools/evaluate_tiny_clip.py: what counts as right, and the whole way with random weights."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ovseg_d2.data.datasets.ovshapes import is_seen
from ovseg_d2.modeling.clip import build as clip_build
from ovseg_d2.structures import ClipFeatures
from tests.helpers import randomise

SCRIPT = Path(__file__).parents[1] / "tools" / "evaluate_tiny_clip.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate_tiny_clip", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["evaluate_tiny_clip"] = module
    spec.loader.exec_module(module)
    return module


def test_scores(tool):
    # Class = 8 * colour + shape: right, right colour, right shape, all wrong.
    labels = torch.tensor([9, 9, 9, 0])
    scores = tool.zero_shot_scores(torch.tensor([9, 10, 17, 63]), labels)
    assert (scores["top1"], scores["color"], scores["shape"]) == (25, 50, 50)
    assert not is_seen(9) and not is_seen(0) and scores["top1_unseen"] == 25


def test_guesses_find_the_name_of_an_embedding(tool, monkeypatch):
    """Pictures whose embeddings are those of texts get these names, in whatever chunks."""
    clip = randomise(clip_build.build_clip("OVShapes-RN")).eval()
    classifier = tool.TextClassifier(
        tokenizer=clip_build.clip_tokenizer("OVShapes-RN"), templates=("{}", "a photo of a {}.")
    ).eval()
    clip.requires_grad_(False)
    names = tool.CLASS_NAMES[: tool.NUM_THINGS]
    things = tool.Vocabulary(names=names, is_thing=(True,) * len(names))
    embeds = tool.averaged(classifier(clip.text, things)).embeds[:, 0]
    labels = torch.arange(64).flip(0)

    def encode(pictures):
        return ClipFeatures(image_embeds=5 * embeds[pictures[:, 0, 0, 0].long()], dense=None, layers={})

    monkeypatch.setattr(clip.visual, "forward", encode)
    monkeypatch.setattr(tool, "normalise_image", lambda images: images.float())
    images = labels.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    assert tool.guesses(clip, classifier, images, batch=10).equal(labels)


def test_whole_way(tool, tmp_path, capsys):
    clip = randomise(clip_build.build_clip("OVShapes-RN"))
    state = {
        name.removeprefix("text.").replace("visual.tower.", "visual."): tensor.contiguous()  # open_clip's names
        for name, tensor in clip.state_dict().items()
    }
    save_file(state, tmp_path / "clip.safetensors")
    args = ["--name", "OVShapes-RN", "--weights", str(tmp_path / "clip.safetensors"), "--templates", "single"]
    args += ["--images", "6", "--workers", "1", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    assert tool.main(args) == 0
    scores = json.loads((tmp_path / "out.json").read_text())
    assert scores["images"] == 6 and 0 <= scores["top1"] <= min(scores["color"], scores["shape"]) <= 100
    assert "top1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "nowhere.safetensors"], "the file nowhere.safetensors does not exist"),
        (["--templates", "vild2"], "'vild2' is neither a set"),
    ],
)
def test_bad_arguments(tool, capsys, flags, message):
    assert tool.main(["--name", "OVShapes-RN", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
