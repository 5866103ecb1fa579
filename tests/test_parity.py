"""The parity runner: the vectors that ship with the project, and what the runner says when something is off."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.parity import Exceptions, check, difference, find_cases, load_case, run_case

GOLDENS = Path(__file__).resolve().parent / "goldens"
CASES = [folder.relative_to(GOLDENS).as_posix() for folder in find_cases(GOLDENS, [], [])]


def test_vectors_are_here():
    assert len(CASES) >= 10


@pytest.mark.parametrize("name", CASES)
def test_parity(name):
    passed, line = check(GOLDENS, GOLDENS / name)
    assert passed, line


def make_case(root, outputs, name="family/topic/a"):
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({"original_dtypes_stored_as_float32": {"out/ids": "int64"}}))
    save_file({f"out/{key}": value for key, value in outputs.items()}, folder / "tensors.safetensors")
    return load_case(root, folder)


def test_integers_must_be_equal_and_missing_outputs_fail(tmp_path):
    ids = torch.tensor([1.0, 2.0])
    case = make_case(tmp_path, {"ids": ids, "x": torch.ones(2)})
    good = {"ids": ids.long(), "x": torch.ones(2) + 1e-5}
    passed, line = run_case(case, lambda _: good, Exceptions())
    assert passed and "2/2" in line
    for bad, words in [
        (good | {"ids": torch.tensor([1, 3])}, "ids off"),
        ({"x": torch.ones(2)}, "ids not computed"),
        (good | {"x": torch.ones(2) + 1e-3}, "x off"),
        (good | {"x": torch.full((2,), float("nan"))}, "x off"),
        (good | {"x": torch.ones(1, 2)}, "x off"),
    ]:
        passed, line = run_case(case, lambda _, bad=bad: bad, Exceptions())
        assert not passed and words in line


def test_exceptions(tmp_path):
    case = make_case(tmp_path, {"x": torch.ones(4), "mid.x": torch.ones(1), "mask": torch.ones(4, dtype=torch.bool)})
    table = {
        "family/topic/*": {"skip": ["mid.*"], "why": "..."},
        "family/*": {"max_flipped_pixels": 1, "outputs": ["mask"], "why": "..."},
    }
    exceptions = Exceptions.for_case(table, case.name)
    mask = torch.tensor([True, True, True, False])
    passed, line = run_case(case, lambda _: {"x": torch.ones(4), "mask": mask}, exceptions)
    assert passed and "2/3" in line
    assert not run_case(case, lambda _: {"x": torch.ones(4), "mask": ~mask}, exceptions)[0]
    assert difference(1.0 + 1e-8, 1.0, rtol=1e-9, atol=0.0).ratio > 1


def test_flipped_pixels_of_pictures():
    """One pixel, in all its channels, of each picture; the others may differ as floats do."""
    expected = torch.rand(2, 3, 4, 5)
    got = expected + 1e-7
    got[0, :, 1, 2], got[1, :, 3, 3] = 9.0, 9.0
    limits = {"rtol": 1e-4, "atol": 5e-5}
    assert difference(got, expected, **limits).ratio > 1
    assert difference(got, expected, **limits, max_flipped=1).ratio <= 1
    got[0, 0, 0, 0] = 9.0
    assert difference(got, expected, **limits, max_flipped=1).ratio > 1


def test_a_case_without_counterpart_is_no_success(tmp_path):
    make_case(tmp_path, {"x": torch.ones(1)})
    passed, line = check(tmp_path, tmp_path / "family/topic/a")
    assert not passed and "unsupported: no topic family/topic" in line


def test_a_crash_is_a_line(tmp_path):
    case = make_case(tmp_path, {"x": torch.ones(1)})
    passed, line = run_case(case, lambda _: 1 / 0, Exceptions())
    assert not passed and "FAIL: ZeroDivisionError" in line
