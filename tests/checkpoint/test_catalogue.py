"""ovseg://NAME: download, sum, conversion; what is said without network and of wrong files. The network is a folder."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from ovseg_d2.checkpoint import catalogue as module
from ovseg_d2.checkpoint.io import read_state_dict, save_atomic
from ovseg_d2.checkpoint.key_maps import KEY_MAPS
from ovseg_d2.engine import load_parts
from tests.helpers import randomise, tiny_cfg
from tests.modeling.test_mask2former import to_public_names
from tools import convert_checkpoint as tool

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAME = "mask2former_coco_panoptic_R50"


@pytest.fixture(scope="module")
def source():
    return randomise(build_model(tiny_cfg()), seed=1)


@pytest.fixture(scope="module")
def public(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("public") / "model.pth"
    save_atomic({"model": to_public_names(source.state_dict())}, path)
    return path.read_bytes()


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """Changes an entry of the catalogue, whose folder is empty; no network."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    entries = dict(module.catalogue())
    monkeypatch.setattr(module, "catalogue", lambda: entries)
    serve(monkeypatch, urllib.error.URLError("no route to host"))

    def change(**values):
        entries[NAME] = replace(entries[NAME], **values)
        return entries[NAME]

    return change


def serve(monkeypatch, answer: bytes | Exception, length: int | None = None) -> list[str]:
    """What every address answers from now on; the addresses that were asked."""
    asked = []

    class Response(io.BytesIO):
        headers = {"Content-Length": str(length)} if length else {}

    def urlopen(url, timeout):
        asked.append(url)
        if isinstance(answer, Exception):
            raise answer
        return Response(answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def fails(message: str) -> None:
    with pytest.raises(module.CatalogueError, match=message) as error:
        module.fetch(NAME)
    assert "\n" not in str(error.value)
    folder = module.folder()
    assert not list(folder.glob("*.safetensors")) and not list(folder.glob(".*.tmp"))


def test_the_table():
    formats = {key_map.name for key_map in KEY_MAPS}
    files = [entry.file for entry in module.catalogue().values()]
    assert len(set(files)) == len(files)
    for name, entry in module.catalogue().items():
        assert entry.format in formats and entry.page.startswith("https://") and entry.title, name
        assert not entry.config or (CONFIGS / entry.config).is_file(), name
        assert entry.config or name.startswith("imagenet_"), name
        assert not entry.url or entry.url.startswith("https://"), name
        assert set(entry.sha256) <= set("0123456789abcdef") and len(entry.sha256) in (0, 8, 64), name
    assert not (formats - {entry.format for entry in module.catalogue().values()}) - {
        "public MaskFormer",
        "public prompts",
        "public FGA-seg",  # publishes no weights
        "public MaskCLIP++ on EVA-01",
    }


def test_download_once(entry, public, monkeypatch, source, caplog):
    """As MODEL.WEIGHTS; the second time without network."""
    entry(sha256=hashlib.sha256(public).hexdigest())
    asked = serve(monkeypatch, public)
    cfg = tiny_cfg()
    cfg.MODEL.WEIGHTS = f"ovseg://{NAME}"
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            model = randomise(build_model(cfg), seed=2)
            load_parts(model, cfg, strict=True)
            for name, value in source.state_dict().items():
                assert torch.equal(model.state_dict()[name], value), name
    assert asked == [module.catalogue()[NAME].url]
    assert "licence: CC BY-NC 4.0" in caplog.text and "public Mask2Former: " in caplog.text
    local = PathManager.get_local_path(cfg.MODEL.WEIGHTS)
    assert local.endswith(".safetensors") and read_state_dict(local).keys() == source.state_dict().keys()


def test_put_there_by_hand(entry, public, caplog):
    """Without network; a sum that nobody publishes is at least said."""
    place = entry(sha256="", url="").original
    place.parent.mkdir(parents=True)
    place.write_bytes(public)
    assert module.fetch(NAME).is_file() and place.is_file()
    assert f"SHA-256 {hashlib.sha256(public).hexdigest()}; none is published" in caplog.text


def test_without_network(entry):
    place = entry().original
    fails(f"{NAME} could not be downloaded .*no route to host.*fetch Mask2Former, ResNet-50, .* from https://dl.fb")
    fails(f"put it at {place} .licence: CC BY-NC 4.0.")
    entry(url="", licence="")
    fails(f"has no address of its own; fetch .* from https://github.com.*{place} .licence: see the page")


def test_the_key_is_named(entry):
    cfg = tiny_cfg()
    cfg.MODEL.WEIGHTS = f"ovseg://{NAME}"
    with pytest.raises(ValueError, match=f"MODEL.WEIGHTS: ovseg://{NAME} could not be downloaded"):
        load_parts(build_model(cfg), cfg, strict=True)
    cfg.MODEL.WEIGHTS = "ovseg://mask2former"
    with pytest.raises(ValueError, match=f"MODEL.WEIGHTS: ovseg://mask2former is not in .*which has .*{NAME}"):
        load_parts(build_model(cfg), cfg, strict=True)


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_wrong_sum(entry, public, monkeypatch, by_hand):
    """A file that somebody put there is not removed."""
    place = entry(sha256="0" * 8).original
    serve(monkeypatch, public)
    if by_hand:
        place.parent.mkdir(parents=True)
        place.write_bytes(public)
    fails(f"has the SHA-256 {hashlib.sha256(public).hexdigest()}, expected 00000000")
    assert place.is_file() == by_hand


def test_a_download_that_breaks_off(entry, public, monkeypatch):
    place = entry().original
    serve(monkeypatch, public[:100], length=len(public))
    fails(f"could not be downloaded .100 of {len(public)} bytes came")
    assert not place.exists()


def test_a_full_disk(entry, public, monkeypatch):
    serve(monkeypatch, public)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ovseg_d2.checkpoint.io.os.fsync", full)
        fails("could not be downloaded .*No space left")
        assert not entry().original.exists()
    assert module.fetch(NAME).is_file()


def test_another_file_than_expected(entry, public, monkeypatch):
    entry(format="public FC-CLIP")
    serve(monkeypatch, public)
    fails("is a file of public Mask2Former, expected public FC-CLIP")
    serve(monkeypatch, b"<html>sign in</html>")
    fails(r"R50\.pkl cannot be read: .*; it was removed; fetch Mask2Former")
    assert not entry().original.exists()


def test_the_list(entry, capsys):
    assert tool.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(module.catalogue())
    assert json.loads((Path(module.__file__).with_name("catalogue.json")).read_text())["checkpoints"].keys() == {
        line.split()[0].removeprefix("ovseg://") for line in lines
    }
