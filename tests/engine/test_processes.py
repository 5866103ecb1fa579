"""Several processes train and evaluate exactly as one; killed runs go on exactly; an error ends all in one line."""

import json

import pytest

from ovseg_d2.engine import default_argument_parser, launch
from tests.engine import recorded_run
from tests.engine.conftest import command_line, corrupt, own_loggers

RUN = "tests/engine/recorded_run.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, RUN]


DATASETS = {"DATASETS.TEST": "('ovshapes_train', 'ovshapes_val')"}  # 8 and 3 pictures: an even and an uneven share


def read(folder, name):
    return json.loads((folder / name).read_text())


def instance_scores(folder, dataset):
    """Sorted scores of every picture."""
    scores = {}
    for instance in read(folder, f"inference/{dataset}/coco_instances_results.json"):
        scores.setdefault(instance["image_id"], []).append(instance["score"])
    return {image: sorted(values) for image, values in scores.items()}


def panoptic_classes(folder, dataset):
    """The classes of every picture's segments."""
    annotations = read(folder, f"inference/{dataset}/panoptic_predictions.json")["annotations"]
    return {image["file_name"]: [x["category_id"] for x in image["segments_info"]] for image in annotations}


def assert_equal_runs(folder, reference):
    losses, expected_losses = read(folder, "losses.json"), read(reference, "losses.json")
    assert len(losses) == len(expected_losses) == 2
    for step, expected in zip(losses, expected_losses, strict=True):
        assert "loss_ce" in step and step == pytest.approx(expected, abs=1e-4)

    results, expected_results = read(folder, "results.json")["results"], read(reference, "results.json")["results"]
    assert results.keys() == expected_results.keys() == {"ovshapes_train", "ovshapes_val"}
    for dataset, tasks in expected_results.items():
        assert tasks.keys() >= {"sem_seg", "panoptic_seg", "segm"}
        for task, metrics in tasks.items():
            assert results[dataset][task] == pytest.approx(metrics, abs=1e-3)
        # After two iterations most metrics are 0; what they are computed from is not.
        scores, expected_scores = instance_scores(folder, dataset), instance_scores(reference, dataset)
        assert scores.keys() == expected_scores.keys()
        for image, values in expected_scores.items():
            assert max(values) > 0 and scores[image] == pytest.approx(values, abs=1e-4)
        assert panoptic_classes(folder, dataset) == panoptic_classes(reference, dataset)


def run_here(*flags, opts):
    """``RUN`` in this process, which has paid for the imports."""
    with own_loggers():
        launch(recorded_run.main, default_argument_parser().parse_args(command_line(*flags, opts=opts)))


@pytest.fixture(scope="module")
def one_process(world_here, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run_here(opts=DATASETS | {"OUTPUT_DIR": folder})
    return folder


@pytest.mark.parametrize(
    ("program", "flags"), [([RUN], ["--num-gpus", 2]), (TORCHRUN, [])], ids=["num-gpus 2", "torchrun"]
)
def test_two_processes_equal_one(start, one_process, tmp_path, program, flags):
    done = start(program, *flags, opts=DATASETS | {"OUTPUT_DIR": tmp_path})
    assert done.returncode == 0, done.stderr
    assert "Process 1 of 2" in (tmp_path / "log.txt.rank1").read_text()
    assert_equal_runs(tmp_path, one_process)


def test_a_run_killed_in_a_save_and_resumed_equals_an_uninterrupted_one(start, one_process, tmp_path):
    opts = DATASETS | {"OUTPUT_DIR": tmp_path, "SOLVER.CHECKPOINT_PERIOD": 1}
    killed = start([RUN, "--kill-in-save", 2], opts=opts)
    assert killed.returncode == -9, killed.stderr
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000000.pth"
    assert (tmp_path / ".model_0000001.pth.tmp").stat().st_size > 1000
    run_here("--resume", opts=opts)
    assert "Going on at iteration 1 of 2" in (tmp_path / "log.txt").read_text()
    assert not list(tmp_path.glob(".*"))
    assert_equal_runs(tmp_path, one_process)


def test_an_error_of_one_process_ends_all_in_one_line(start, world, tmp_path):
    """One process meets the corrupt image while the other waits for its gradients."""
    opts = {"OUTPUT_DIR": tmp_path, "DATALOADER.ON_CORRUPT_IMAGE": "raise"}
    with corrupt(world) as image:
        # Returns only when no process is left that holds the pipes.
        done = start(["train_net.py"], "--num-gpus", 2, opts=opts)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert image.name in last and "cannot be decoded" in last
    assert "Traceback" not in done.stderr
