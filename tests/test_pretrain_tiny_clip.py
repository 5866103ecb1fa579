"""The pre-training of the tiny CLIPs: its parts, and a run of a few steps that is interrupted."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ovseg_d2.data.datasets.ovshapes import CLASS_NAMES
from ovseg_d2.data.templates import TEMPLATE_SETS
from ovseg_d2.modeling.clip.build import build_clip, load_clip_pretrained
from tools import pretrain_tiny_clip
from tools.tiny_clip.data import CaptionSampler
from tools.tiny_clip.model import build, mimetic_init
from tools.tiny_clip.optimizer import orthogonalised


def run(tmp_path, output, *more):
    command = ["--name", "OVShapes-RN", "--output", str(tmp_path / output), "--workers", "1"]
    command += ["--pool", str(tmp_path / "pool"), "--images", "24", "--large-images", "12", "--large-steps", "2"]
    command += ["--batch", "6", "--test-images", "4", "--eval-period", "2", "--warmup", "2", *more]
    pretrain_tiny_clip.main(command)


def test_a_run_goes_on_where_it_stopped(monkeypatch, tmp_path):
    exports = [tmp_path / name for name in ("whole.safetensors", "resumed.safetensors")]
    run(tmp_path, "whole", "--steps", "4", "--export", str(exports[0]))

    stop_after, steps = 2, []
    original = CaptionSampler.__call__

    def counting(self, *args):
        steps.append(1)
        if len(steps) == stop_after + 1:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(CaptionSampler, "__call__", counting)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "resumed", "--steps", "4")
    run(tmp_path, "resumed", "--steps", "4", "--export", str(exports[1]))

    whole, resumed = (load_file(path) for path in exports)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    log = [json.loads(line) for line in (tmp_path / "resumed/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [2, 4] and set(log[0]) >= {"loss", "top1", "color", "shape"}

    # What is exported is what the package loads.
    load_clip_pretrained(build_clip("OVShapes-RN"), "OVShapes-RN", str(exports[0]))


def test_orthogonalised():
    for shape in [(6, 20), (20, 6)]:
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=torch.manual_seed(0))))
        assert 0.6 < values.min() and values.max() < 1.3


def test_mimetic_attention_looks_at_what_is_alike():
    torch.manual_seed(0)
    model, _ = build("OVShapes-ViT")
    mimetic_init(model.visual)
    attention = model.visual.transformer.resblocks[0].attn
    query, key, value = attention.in_proj_weight.detach().chunk(3)
    assert torch.trace(query.T @ key) > 0.5 * 128
    assert torch.trace(attention.out_proj.weight.detach() @ value) < -0.25 * 128


def test_captions_of_a_batch():
    _, tokenizer = build("OVShapes-RN")
    labels = np.array([[3, -1, -1], [3, 11, -1], [64, -1, -1], [3, 11, -1]])
    tokens, targets = CaptionSampler(tokenizer, torch.device("cpu"))(labels, np.random.default_rng(0))
    assert targets.tolist() == [3, 72, 64, 72] and len(tokens) == 73
    assert "orange star" in tokenizer.decode(tokens[72].tolist()[: int(tokens[72].argmax())])


def test_trimmed_tokenizer_keeps_the_words():
    _, tokenizer = build("OVShapes-RN")
    for word in {word for name in CLASS_NAMES for word in name.split()} | {"photo", "scene"}:
        assert len(tokenizer.encode(word)) == 1
    assert len(tokenizer.encode(TEMPLATE_SETS["ldvc"][0].format("").strip())) == 6
    assert tokenizer.decode(tokenizer.encode("a zebra")).strip() == "a zebra"
