"""tools/visualize_data.py draws what the mapper gives."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovseg_d2.data.datasets.ovshapes_writer import WorldSettings, write_world
from ovseg_d2.engine.load_config import load_config
from tests.helpers import ovshapes_below
from tools import visualize_data

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """OVShapes with few pictures, in the place of the registered one."""
    root = tmp_path_factory.mktemp("datasets")
    write_world(str(root / "ovshapes"), WorldSettings(train=2, val=1))
    with ovshapes_below(root):
        yield root / "ovshapes"


def run(tmp_path, *args, config="fcclip"):
    path = tmp_path / "sheets" / "data.png"
    config_file = str(CONFIGS / "ovshapes" / f"{config}.yaml")
    visualize_data.main(["--config-file", config_file, "--output", str(path), *args])
    return np.asarray(Image.open(path))


def test_sheet(tmp_path):
    sheet = run(tmp_path, "--images", "1", "--draws", "1")
    wider = run(tmp_path, "--images", "1", "--draws", "2")
    assert sheet.shape[0] == wider.shape[0] and sheet.shape[1] < wider.shape[1]
    inner = np.s_[:-80, : sheet.shape[1] - 40]  # without the caption and the margin
    assert np.array_equal(sheet[inner], wider[inner])  # a seed, so the first draw is the same
    assert not np.array_equal(sheet, run(tmp_path, "--images", "1", "--draws", "1", "--seed", "1"))


def test_masks_are_drawn(tmp_path, monkeypatch):
    seen = []
    draw = visualize_data.ResultDrawer.draw_masks

    def spy(drawer, image, class_ids, masks, **options):
        seen.append((image.shape[:2], [drawer.class_names[k] for k in class_ids.tolist()], masks))
        return draw(drawer, image, class_ids, masks, **options)

    monkeypatch.setattr(visualize_data.ResultDrawer, "draw_masks", spy)
    run(tmp_path, "--images", "1", "--dataset", "ovshapes_val", "--draws", "1", "INPUT.FORMAT", "BGR")
    ((size, names, masks),) = seen
    assert size == tuple(masks.shape[1:]) == (128, 128) and len(names) == len(masks) > 0 and masks.any()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset", "nothing"], "'nothing'"),
        (["--start", "7"], "--start is 7; dataset 'ovshapes_train_seen' has pictures 0 to"),
        (["--draws", "0"], "--draws 0; expected 1 or more"),
        (["DATASETS.TRAIN", "()"], "expected a --dataset"),
    ],
)
def test_bad_input(tmp_path, args, message):
    with pytest.raises(SystemExit, match="^error: ") as error:
        run(tmp_path, *args)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_datasets_of_instances_have_their_names(tmp_path):
    cfg = load_config(CONFIGS / "ovshapes" / "fcclip.yaml")
    assert len(visualize_data.drawer_of(cfg.DATASETS.TEST[0]).class_names) == 72
