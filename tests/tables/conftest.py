"""Tables that run with a stub in the place of train_net.py."""

import subprocess

import pytest
import yaml

from tests.tables.stubs import DEFAULTS, TABLE, TrainNet
from tools import row_files, run_table


@pytest.fixture
def train_net(monkeypatch):
    stub = TrainNet()
    row_files.file_settings.cache_clear()
    monkeypatch.setattr(subprocess, "call", stub)
    monkeypatch.setattr(row_files, "resolved", lambda command: DEFAULTS | row_files.settings(command))
    monkeypatch.setattr(row_files, "code_version", lambda root=None: "as it is")
    return stub


@pytest.fixture
def run(train_net, tmp_path, capsys, monkeypatch):
    """Run a table; returns the exit code, what was printed and what went to stderr."""
    for name in ("base", "other"):
        (tmp_path / f"{name}.yaml").write_text(f"DATASETS:\n  TEST: ('{name}',)\n")
    monkeypatch.setattr(row_files, "ROOT", tmp_path)

    def run(*flags, **changes):
        path = tmp_path / "table.yaml"
        path.write_text(yaml.safe_dump(TABLE | changes))
        row_files.file_settings.cache_clear()
        places = ["--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
        code = run_table.main([str(path), *places, "--jobs", "2", *flags])
        return code, *capsys.readouterr()

    return run
