"""Reading never runs code and says what is wrong with a file; writing is whole or not at all."""

import argparse
import os
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from ovseg_d2.checkpoint import io

WEIGHT = torch.arange(6.0).reshape(2, 3)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".pkl"])
def test_reads_every_kind_and_unwraps(tmp_path, suffix, wrapper):
    path = tmp_path / f"weights{suffix}"
    state = {"a.weight": WEIGHT, "a.bias": WEIGHT[0].clone()}
    if suffix == ".safetensors":
        if wrapper:
            pytest.skip("safetensors files are flat")
        safetensors.torch.save_file(state, path)
    elif suffix == ".pkl":
        state = {name: tensor.numpy() for name, tensor in state.items()}
        path.write_bytes(pickle.dumps({wrapper: state, "matching_heuristics": True} if wrapper else state))
    else:
        torch.save({wrapper: state, "iteration": 3} if wrapper else state, path)
    read = io.read_state_dict(path, allow_pickle=True)
    assert set(read) == {"a.weight", "a.bias"}
    assert torch.equal(read["a.weight"], WEIGHT)
    if wrapper and suffix in (".pth", ".pkl"):
        assert io.read_checkpoint(path, allow_pickle=True)["iteration" if suffix == ".pth" else "matching_heuristics"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl", ".onnx", ""])
@pytest.mark.parametrize("kind", ["torch", "old torch", "safetensors", "pickle"])
def test_the_content_tells_the_kind(tmp_path, kind, suffix):
    path = tmp_path / f"weights{suffix}"
    if kind == "safetensors":
        path.write_bytes(safetensors.torch.save({"w": WEIGHT}))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"w": WEIGHT.numpy()}))
        with pytest.raises(ValueError, match=f"weights{suffix} refused: it is a Python pickle"):
            io.read_state_dict(path)
    else:
        torch.save({"w": WEIGHT}, path, _use_new_zipfile_serialization=kind == "torch")
    assert torch.equal(io.read_state_dict(path, allow_pickle=True)["w"], WEIGHT)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_pickles_of_every_protocol(tmp_path, protocol):
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps({"model": {"w": WEIGHT.numpy(), "n": np.float32(2)}}, protocol=protocol))
    read = io.read_state_dict(path, allow_pickle=True)
    assert torch.equal(read["w"], WEIGHT) and read["n"] == 2


def test_harmless_content_of_training_checkpoints(tmp_path):
    path = tmp_path / "weights.pth"
    history = defaultdict(list, {"loss": [1.0, 2.0]})
    content = {
        "state_dict": OrderedDict({"module.w": WEIGHT, "module.n": np.ones(2, dtype=np.float16)}),
        "args": argparse.Namespace(lr=np.float64(0.5)),
        "history": history,
        "best": np.int64(3),
    }
    torch.save(content, path)
    allowed_before = set(torch.serialization.get_safe_globals())
    read = io.read_checkpoint(path)
    assert set(read["model"]) == {"w", "n"}, "the prefix of DistributedDataParallel is taken off"
    assert read["model"]["n"].dtype == torch.float16
    assert read["history"] == {"loss": [1.0, 2.0]} and read["best"] == 3 and read["args"].lr == 0.5
    assert set(torch.serialization.get_safe_globals()) == allowed_before, "the permission lasts for one read"


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_pickle_bomb_does_not_go_off(tmp_path, suffix):
    path, target = tmp_path / f"bomb{suffix}", tmp_path / "exploded"
    content = {"model": {"w": WEIGHT.numpy() if suffix == ".pkl" else WEIGHT}, "extra": Bomb(target)}
    if suffix == ".pth":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"bomb\.\w+ refused: it names posix\.mkdir, and") as error:
        io.read_state_dict(path, allow_pickle=True)
    assert "\n" not in str(error.value)
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists(), "the bomb itself works"


def test_pkl_needs_the_flag_and_says_why(tmp_path):
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps({"w": WEIGHT.numpy()}))
    with pytest.raises(ValueError, match=r"R-50\.pkl refused.*pickle, a program.*CHECKPOINT\.ALLOW_PICKLE True"):
        io.read_state_dict(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "noise"])
def test_a_damaged_file_is_one_line(tmp_path, suffix, damage):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps({"w": WEIGHT.numpy()}))
    else:
        io.save_atomic({"w": WEIGHT}, path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "noise": os.urandom(500)}[damage])
    with pytest.raises(ValueError, match=r"checkpoint .*weights\.\w+ (cannot be read|refused)") as error:
        io.read_state_dict(path, allow_pickle=True)
    assert "\n" not in str(error.value)


def test_wrong_names_and_content(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pth does not exist"):
        io.read_state_dict(tmp_path / "nothing.pth")
    other = tmp_path / "weights.onnx"
    other.touch()
    with pytest.raises(ValueError, match=r"unknown suffix '\.onnx', allowed are \.pth"):
        io.read_state_dict(other)
    with pytest.raises(ValueError, match="cannot save"):
        io.save_atomic({}, other)
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"empty\.pth holds no tensors; found epoch"):
        io.read_state_dict(tmp_path / "empty.pth")
    torch.save([WEIGHT], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds a list"):
        io.read_state_dict(tmp_path / "list.pth")


def test_safetensors_takes_tied_and_strided_tensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    io.save_atomic({"model": {"a": WEIGHT, "tied": WEIGHT, "t": WEIGHT.t()}, "iteration": 3}, path)
    read = io.read_state_dict(path)
    assert torch.equal(read["a"], read["tied"]) and torch.equal(read["t"], WEIGHT.t())


def test_an_exception_while_writing_keeps_the_old_file(tmp_path):
    path = tmp_path / "weights.pth"
    io.save_atomic({"w": WEIGHT}, path)
    with pytest.raises(KeyError), io.atomic_write(path) as file:
        file.write(b"half")
        raise KeyError
    assert torch.equal(io.read_state_dict(path)["w"], WEIGHT)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"]
