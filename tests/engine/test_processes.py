"""Several processes train and evaluate exactly as one; resumed runs go on exactly; errors are one line."""

import pytest

from tests.engine.conftest import recorded

RUN = "tests/engine/recorded_run.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, RUN]


def assert_equal_runs(folder, reference):
    (losses, results), (expected_losses, expected_results) = recorded(folder), recorded(reference)
    assert len(losses) == len(expected_losses) > 0
    for step, expected in zip(losses, expected_losses, strict=True):
        assert step == pytest.approx(expected, abs=1e-4)
    assert results.keys() == expected_results.keys()
    for dataset, tasks in expected_results.items():
        for task, metrics in tasks.items():
            assert results[dataset][task] == pytest.approx(metrics, abs=1e-3)


@pytest.fixture(scope="module")
def one_process(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    done = start([RUN], opts={"OUTPUT_DIR": folder})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("program", "flags"), [([RUN], ["--num-gpus", 2]), (TORCHRUN, [])], ids=["num-gpus 2", "torchrun"]
)
def test_two_processes_equal_one(start, one_process, tmp_path, program, flags):
    done = start(program, *flags, opts={"OUTPUT_DIR": tmp_path})
    assert done.returncode == 0, done.stderr
    assert "Process 1 of 2" in (tmp_path / "log.txt.rank1").read_text()
    assert_equal_runs(tmp_path, one_process)


def test_killed_and_resumed_run_equals_an_uninterrupted_one(start, one_process, tmp_path):
    opts = {"OUTPUT_DIR": tmp_path, "SOLVER.CHECKPOINT_PERIOD": 1}
    killed = start([RUN, "--kill-after", 1], opts=opts)
    assert killed.returncode == -9, killed.stderr
    done = start([RUN], "--resume", opts=opts)
    assert done.returncode == 0, done.stderr
    assert "Going on at iteration 1 of 2" in (tmp_path / "log.txt").read_text()
    assert_equal_runs(tmp_path, one_process)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ({"SOLVER.IMS_PER_BATCH": 3}, "SOLVER.IMS_PER_BATCH is 3"),
        ({"SOLVER.BASE_LR": 1e30, "SOLVER.CLIP_GRADIENTS.ENABLED": False}, "expected finite losses"),
    ],
    ids=["batch", "nan"],
)
def test_an_error_in_several_processes_is_one_line(start, tmp_path, opts, message):
    done = start(["train_net.py"], "--num-gpus", 2, opts=opts | {"OUTPUT_DIR": tmp_path})
    assert done.returncode == 1, done.stderr
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
