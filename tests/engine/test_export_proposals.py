"""tools/export_proposals.py: masks into files, an interruption, and a run that starts from the files."""

import json

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from ovseg_d2.data.image_io import read_image
from ovseg_d2.data.proposal_files import ProposalReader
from ovseg_d2.engine.load_config import load_config
from tests.engine.conftest import CONFIG, EXACT, ROOT, command_line
from tests.helpers import randomise
from tests.modeling.tiny_fcclip import COLOURS, inputs
from tests.modeling.tiny_mta_clip import mta_cfg, random_mta
from tools import export_proposals

TOOL = [ROOT / "tools" / "export_proposals.py"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the tiny model of ``EXACT``."""
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    model = build_model(load_config(ROOT / CONFIG, [str(word) for pair in EXACT.items() for word in pair]))
    torch.save(randomise(model).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def exported(start, weights, tmp_path_factory):
    """A folder with the masks of the validation pictures, and the export's own words."""
    folder = tmp_path_factory.mktemp("masks")
    done = start(TOOL, "--datasets", "ovshapes_val", "--output", folder, opts={"MODEL.WEIGHTS": weights})
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_files_and_recall(exported):
    folder, output = exported
    reader = ProposalReader(folder / "ovshapes_val.jsonl")
    assert len(reader.image_ids) == 3 and reader.header["dataset"] == "ovshapes_val"
    masks = [reader.masks(image_id, (64, 64)) for image_id in reader.image_ids]
    assert all(0 < len(m) <= 20 and m.any(axis=(1, 2)).all() for m in masks)
    line = json.loads((folder / "ovshapes_val.jsonl").read_text().splitlines()[1])
    assert len(line["scores"]) == len(line["counts"]) and all(0 <= score <= 1 for score in line["scores"])
    scores = json.loads((folder / "ovshapes_val.recall.json").read_text())
    assert 0 < scores["mean_best_iou"] < 100 and "mean_best_iou_unseen" in scores and "mean_best_iou" in output


def export(*flags, opts):
    """The tool in this process."""
    return export_proposals.main(command_line(*flags, opts=opts))


def test_an_interrupted_export_goes_on(world_here, weights, exported, tmp_path, capsys):
    whole = (exported[0] / "ovshapes_val.jsonl").read_bytes()
    path = tmp_path / "ovshapes_val.jsonl"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    flags = ("--datasets", "ovshapes_val", "--output", tmp_path, "--no-recall")
    assert export(*flags, opts={"MODEL.WEIGHTS": weights}) == 0 and path.read_bytes() == whole
    capsys.readouterr()

    # Other weights would mix masks of two models in one file.
    state = torch.load(weights, weights_only=True)
    state["proposals.mask_decoder.query_feat.weight"] += 1
    torch.save(state, tmp_path / "other.pth")
    assert export(*flags, opts={"MODEL.WEIGHTS": tmp_path / "other.pth"}) == 2 and path.read_bytes() == whole
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "holds proposals of fingerprint" in line


@pytest.mark.parametrize(
    ("flags", "opts", "message"),
    [
        (["--datasets", "ovshapes_vall"], {}, "dataset 'ovshapes_vall' is not registered; did you mean ovshapes_val"),
        (["--datasets", "ovshapes_val"], {"MODEL.WEIGHTS": "absent.pth"}, "absent.pth does not exist"),
    ],
)
def test_bad_arguments(tmp_path, flags, opts, message, capsys):
    assert export(*flags, "--output", tmp_path, opts=opts) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(tmp_path.iterdir())


def test_regions_of_annotations(world_here, tmp_path):
    flags = ("--from-annotations", "regions", "--datasets", "ovshapes_val", "--output", tmp_path)
    assert export(*flags, opts={}) == 0
    scores = json.loads((tmp_path / "ovshapes_val.recall.json").read_text())
    assert 80 < scores["mean_best_iou"] <= 100  # a segment that another one cuts in two is no region
    reader = ProposalReader(tmp_path / "ovshapes_val.jsonl")
    assert reader.header["annotations"] == "regions" and len(reader.image_ids) == 3
    masks = [reader.masks(image_id, (64, 64)) for image_id in reader.image_ids]
    assert all((m.sum(axis=0) == 1).all() for m in masks)  # all of a picture is labelled, once


def test_masks_are_what_the_model_gives(exported, world, weights):
    folder, _ = exported
    reader = ProposalReader(folder / "ovshapes_val.jsonl")
    model = build_model(load_config(ROOT / CONFIG, [str(word) for pair in EXACT.items() for word in pair])).eval()
    model.load_state_dict(torch.load(weights, weights_only=True))
    line = json.loads((folder / "ovshapes_val.jsonl").read_text().splitlines()[1])
    image = read_image(str(world / "ovshapes" / "val" / line["file_name"]), "RGB")
    with torch.no_grad():
        images = model.preprocess([{"image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))}])
        logits = model.proposals(images).mask_logits
    masks = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=False)[0] > 0
    masks = masks[masks.flatten(1).any(1)].numpy()
    found = reader.masks(line["image_id"], (64, 64))
    assert found.shape == masks.shape and (found == masks).mean() > 0.999


# The seeds give masks of both signs.
@pytest.mark.parametrize(("class_head", "seed"), [("linear", 4), ("embed", 2)])
def test_masks_of_mta_clip_are_those_that_saw_the_texts(class_head, seed):
    cfg = mta_cfg(TEXT_ENHANCED=class_head == "linear")
    cfg.MODEL.OVSEG.PROPOSALS.CLASS_HEAD = class_head
    model, (x,) = random_mta(cfg, seed).eval(), inputs((48, 64))
    masks, scores = export_proposals.masks_of(model, x, COLOURS)
    with torch.no_grad():
        proposals = model.predict(model.preprocess([x]), COLOURS)
    logits = torch.nn.functional.interpolate(proposals.mask_logits, size=(64, 64), mode="bilinear")[0, :, :48]
    assert torch.equal(masks, logits > 0) and 0.2 < masks.float().mean() < 0.8
    torch.testing.assert_close(torch.tensor(scores), 1 - proposals.class_logits[0].softmax(-1)[:, -1])
