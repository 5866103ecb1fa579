"""docs/model_zoo.md names configurations and rows of tables that exist and says the numbers of the methods' pages."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "model_zoo.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in PAGE.splitlines() if ".yaml`" in line]
PREFIXES = ("", "ldvc/", "zegclip/", "mta_clip/", "mta_clip/baseline_", "dense_clip/")


def test_configurations_exist():
    files = [name for row in ROWS for name in re.findall(r"`([\w/]+\.yaml)`", row[0])]
    assert len(files) > 30
    assert [f for f in files if not any((ROOT / "configs" / f"{prefix}{f}").exists() for prefix in PREFIXES)] == []


def test_rows_that_were_run_are_rows_of_tables():
    tables = [yaml.safe_load(path.read_text()) for path in (ROOT / "tools" / "tables").glob("*.yaml")]
    known = {row["name"] for table in tables for row in table["rows"]}
    named = {name for row in ROWS for name in re.findall(r"`([^`]+)`", row[-1]) if not name.endswith(".yaml")}
    assert len(named) > 10 and named <= known


def test_nothing_is_claimed_as_reproduced():
    lines = [line for line in PAGE.splitlines() if ".yaml`" in line]
    assert lines and all("| no |" in line for line in lines)


def test_numbers_are_those_of_the_pages():
    """Of every configuration with a page: each group of numbers stands there, too (MAFT's in a table of columns)."""
    pages = "".join(
        (ROOT / "docs" / f"{name}.md").read_text() for name in ("maskclippp", "maft", "fga_seg", "ldvc", "mta_clip")
    )
    pages = re.sub(r"\s*\|\s*", " / ", pages)
    quoted = ("fcclip/coco_panoptic_ConvNeXtL", "maft_plus/coco_171", "mask2former/")  # no page of their own
    groups = [
        group
        for row in ROWS
        if not any(name in row[0] for name in quoted) or "maskclippp" in row[0]
        for group in re.findall(r"\d+\.\d(?: / \d+\.\d)+", " | ".join(row))
    ]
    assert len(groups) > 40 and [group for group in groups if group not in pages] == []
