"""tools/benchmark.py: its command line, and topics with small models in the place of the large ones."""

import json

import pytest
import torch

from ovseg_d2.modeling.clip.build import build_clip, clip_tokenizer
from tests.modeling.tiny_fga_seg import NUM_CLASSES, fga_cfg, inputs, make
from tools import benchmark
from tools.benchmarks import fga_seg, lcsa, maft, mask2former, text

CPU = torch.device("cpu")


def test_it_reports_and_writes_the_topics_that_are_asked_for(monkeypatch, tmp_path, capsys):
    topic = benchmark.Topic(lambda repeats, device: {"core, a": [2.0, 1.0, 4.0], "core, plain form, a": [6.0]}, 1, "")
    monkeypatch.setitem(benchmark.TOPICS, "text", topic)
    benchmark.main(["--only", "text", "--repeats", "3", "--device", "cpu", "--output", str(tmp_path / "out.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("3 repeats") and lines[2] == "text" and lines[4].split() == ["core,", "a", "1.0", "2.0"]
    assert lines[-1] == "core, a: 3.00 times as fast as the plain form (medians)"
    assert json.loads((tmp_path / "out.json").read_text()) == {"text": topic.run(3, CPU)}


def test_help_lists_the_topics(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    names = ["deformable", "mask2former", "text", "maft", "mta_clip", "fgaseg", "lcsa"]
    assert [line.split()[0] for line in lines if line.endswith(" min")] == names == list(benchmark.TOPICS)


def test_parts_of_mask2former():
    timings = mask2former.run(repeats=2, device=CPU, config="ovshapes/mask2former.yaml", size=64)
    parts = ["backbone", "pixel decoder", "mask decoder", "total", "semantic inference"]
    assert sorted(timings) == sorted(parts) and all(len(values) == 2 for values in timings.values())
    assert 0 < sum(min(timings[part]) for part in parts[:3]) <= max(timings["total"])


def test_texts_cut_or_whole(monkeypatch, capsys):
    monkeypatch.setattr(text, "build_clip", lambda name: build_clip("OVShapes-ViT"))
    monkeypatch.setattr(text, "clip_tokenizer", lambda name: clip_tokenizer("OVShapes-ViT"))
    timings = text.run(repeats=1, device=CPU, names=3, compared_names=2)
    assert list(timings) == ["core, 2 names", "core, plain form, 2 names"]
    out = capsys.readouterr().out
    assert "3 names x 14 templates, cut" in out and float(out.split()[-1]) < 1e-4


def test_masks_in_one_pass_or_as_crops(monkeypatch, capsys):
    options = {"mask_mode": "maft", "start_layer": 4, "last_block": "none"}
    clip = build_clip("OVShapes-ViT", visual_kwargs=options, with_text=False).visual.eval()
    monkeypatch.setattr(maft, "ip_clip", lambda device: clip)
    timings = maft.run(repeats=1, device=CPU, count=2, counts=(), size=64, crop_size=32)
    assert list(timings) == ["IP-CLIP", "2 crops", "2 crops, without CLIP"]
    assert "2 crops take" in capsys.readouterr().out


def test_local_consensus(capsys):
    forms = ("gather", "all pixels, materialised")
    timings = lcsa.figures(1, CPU, 16, forms)
    assert list(timings) == [f"{form}, 16 x 16, {kind}" for kind in ("forward", "step") for form in forms]
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row[:35].strip() for row in rows] == list(forms) and all(len(row[35:].split()) == 4 for row in rows)


def test_all_pixels_are_those_of_the_module():
    torch.manual_seed(0)
    module, x = lcsa.LocalConsensusAttention(dim=64), torch.randn(2, 8, 12, 64)
    module.top_k = 0
    torch.testing.assert_close(lcsa.materialised(module, x), module(x))


@pytest.mark.parametrize("planted", [1, 3])
def test_planted_classes_survive(planted):
    torch.manual_seed(0)
    model = make(fga_cfg(FAST=True, MAX_CLASSES=0))
    head, kept = model.cost_head, []
    head.top_k = 1
    head.decoder.head.register_forward_pre_hook(lambda _module, args: kept.append(len(args[0])))
    with fga_seg.planted_classes(head, planted, NUM_CLASSES), torch.no_grad():
        model(inputs((64, 96)))
    assert kept == [planted]
