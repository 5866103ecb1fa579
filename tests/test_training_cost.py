"""The tool that measures training steps."""

from tools import training_cost


def test_it_reports_each_batch_size(capsys):
    argv = ["--config-file", "configs/ovshapes/maskclippp.yaml", "--size", "64", "96", "--masks", "2", "--repeats", "1"]
    assert training_cost.main([*argv, "DATASETS.TRAIN", "()"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("batch 1 of 64 x 96: ") and "MiB beyond the model at rest" in line


def test_bad_config(capsys):
    assert training_cost.main(["--config-file", "configs/ovshapes/maskclippp.yaml", "MODEL.NO", "1"]) == 1
    assert capsys.readouterr().err.startswith("training_cost: ")
