"""The tool that compares the fast path of FGA-seg with all classes."""

import pytest
import torch

from tests.modeling.tiny_fga_seg import NUM_CLASSES, fga_cfg, inputs, make
from tools import top_k_agreement


def test_all_classes_agree_with_themselves_and_fewer_survive_a_smaller_k():
    torch.manual_seed(0)
    model = make(fga_cfg(FAST=True, MAX_CLASSES=0))
    batches = [[x] for x in inputs((64, 96), (50, 41))]
    rows = top_k_agreement.compare(model, batches, [1, NUM_CLASSES, 0])
    assert [row["agreement"] for row in rows[1:]] == [pytest.approx(100), 100]
    assert [row["survivors"] for row in rows[1:]] == [NUM_CLASSES, NUM_CLASSES]
    assert rows[0]["survivors"] < NUM_CLASSES and 0 <= rows[0]["agreement"] <= 100
    assert all(row["ms"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "expected MODEL.META_ARCHITECTURE FGASeg, MODEL.OVSEG.FGA_SEG.FAST True"),
        (["--top-k", "0"], "--top-k 0"),
    ],
)
def test_bad_input(argv, message, capsys):
    assert top_k_agreement.main(["--config-file", "configs/ovshapes/fga_seg.yaml", *argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith("top_k_agreement: ") and message in error
