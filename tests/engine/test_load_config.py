"""Config errors are one line that names the key or the file."""

import pytest
from detectron2.utils import comm

from ovseg_d2.engine import default_argument_parser, load_config, setup
from tests.engine.conftest import CONFIG, ROOT
from tools import row_files


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASE_LRR", "1"], "unknown config key SOLVER.BASE_LRR; the nearest known one is SOLVER.BASE_LR"),
        (["SOLVER", "1"], "config key SOLVER is a section"),
        (["SOLVER.BASE_LR"], "expected KEY VALUE pairs"),
        (["SOLVER.BASE_LR", "1", "--num-gpus", "2"], "options stand before the KEY VALUE pairs, found --num-gpus"),
        (["SOLVER.MAX_ITER", "many"], "MAX_ITER"),
        (
            ["DATASETS.TRAIN", "mine"],
            "config key DATASETS.TRAIN takes a list, found 'mine'; for one entry \"['mine']\"",
        ),
        (["INPUT.PIPELINE", "zoom"], "INPUT.PIPELINE is 'zoom', allowed are lsj, crop, resize"),
        (["MODEL.OVSEG.TEST.TASKS", "['semantic','depth']"], "MODEL.OVSEG.TEST.TASKS is 'depth'"),
        (["MODEL.META_ARCHITECTURE", "Mask3Former"], "MODEL.META_ARCHITECTURE is 'Mask3Former', allowed are"),
    ],
)
def test_bad_keys_and_values(opts, message):
    with pytest.raises(ValueError) as error:
        load_config(ROOT / CONFIG, opts)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config file nowhere.yaml does not exist"):
        load_config("nowhere.yaml")
    file = tmp_path / "a.yaml"
    file.write_text("MODEL: {NAME: x}\n")
    with pytest.raises(ValueError, match="unknown config key MODEL.NAME in .*a.yaml"):
        load_config(file)
    file.write_text("MODEL: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ValueError, match="is no plain YAML"):
        load_config(file)
    file.write_text("_BASE_: gone.yaml\n")
    with pytest.raises(FileNotFoundError, match="is based on .*gone.yaml, which does not exist"):
        load_config(file)


def test_whole_numbers_where_floats_are_meant():
    assert load_config(ROOT / CONFIG, ["SOLVER.BASE_LR", "1"]).SOLVER.BASE_LR == 1.0


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            ["INPUT.CROP.SIZE", "[16, 96]"],
            r"CROP.SIZE is \[16, 96\], smaller than MODEL.OVSEG.SIZE_DIVISIBILITY, 32",
        ),
        (["MODEL.OVSEG.SIZE_DIVISIBILITY", "128"], r"INPUT.CROP.SIZE is \[96, 96\], smaller than .*, 128"),
        (["INPUT.PIPELINE", "lsj", "INPUT.IMAGE_SIZE", "24"], "INPUT.IMAGE_SIZE is 24, smaller than .*, 32"),
        (["INPUT.PIPELINE", "resize", "INPUT.CROP.SIZE", "[16, 16]"], None),
        (["INPUT.CROP.SIZE", "[0.5, 0.5]", "INPUT.CROP.TYPE", "relative"], None),
        (["INPUT.CROP.SIZE", "[16, 16]", "INPUT.CROP.ENABLED", "False"], None),
    ],
)
def test_a_crop_is_not_smaller_than_the_padding(opts, message):
    if message is None:
        load_config(ROOT / CONFIG, opts)
    else:
        with pytest.raises(ValueError, match=message):
            load_config(ROOT / CONFIG, opts)


def test_settings_of_a_command():
    """What tools/run_table.py compares: all that a file and options set is in the whole, with the same values."""
    command = (
        "python train_net.py --config-file configs/ovshapes/maft.yaml --eval-only MODEL.DEVICE cpu SOLVER.BASE_LR 1"
    )
    chosen, found = row_files.settings(command), row_files.resolved(command)
    assert (
        chosen["SOLVER.BASE_LR"] == 1 and chosen["MODEL.META_ARCHITECTURE"] == "MAFT" and "MODEL.DEVICE" not in chosen
    )
    assert len(found) > len(chosen) > 20 and {key: found[key] for key in chosen} == chosen


def arguments(*words):
    return default_argument_parser().parse_args(["--config-file", str(ROOT / CONFIG), *map(str, words)])


def test_setup_checks_the_data_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opts = ["OUTPUT_DIR", tmp_path, "MODEL.DEVICE", "cpu"]
    with pytest.raises(ValueError, match="ovshapes_tran.*ovshapes_train"):
        setup(arguments("DATASETS.TRAIN", "('ovshapes_tran',)", *opts))
    with pytest.raises(ValueError, match="MODEL.DEVICE is 'gpu'"):
        setup(arguments("OUTPUT_DIR", tmp_path, "MODEL.DEVICE", "gpu"))


def test_setup_needs_a_config_file_and_a_folder_to_write_to(tmp_path):
    with pytest.raises(ValueError, match="--config-file is not given; expected a YAML file"):
        setup(default_argument_parser().parse_args([]))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="OUTPUT_DIR is .*file', which cannot be made a folder"):
        setup(arguments("OUTPUT_DIR", tmp_path / "file"))


def test_batch_size_fits_the_processes_in_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    opts = ["OUTPUT_DIR", tmp_path, "SOLVER.IMS_PER_BATCH", 3]
    with pytest.raises(ValueError, match=r"SOLVER.IMS_PER_BATCH is 3, expected a positive multiple of 2 \(processes\)"):
        setup(arguments(*opts))
    with pytest.raises(ValueError, match="ovshapes_vall"):  # evaluation does not mind, and gets to its data
        setup(arguments("--eval-only", *opts, "DATASETS.TEST", "('ovshapes_vall',)"))


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        default_argument_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    assert "--num-gpus 2 MODEL.DEVICE cpu" in text and "--resume" in text and "torchrun" in text
