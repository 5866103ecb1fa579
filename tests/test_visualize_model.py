"""tools/visualize_model.py writes its figures for the models that have the pieces."""

from pathlib import Path

import pytest

from ovseg_d2.data.datasets.ovshapes_writer import WorldSettings, write_world
from tests.helpers import ovshapes_below
from tools import visualize_model

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "ovshapes"


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """OVShapes with few pictures, in the place of the registered one."""
    root = tmp_path_factory.mktemp("datasets")
    write_world(str(root / "ovshapes"), WorldSettings(train=1, val=1))
    with ovshapes_below(root):
        yield root / "ovshapes"


def run(folder, figure, config, *args):
    config_file = str(CONFIGS / f"{config}.yaml")
    visualize_model.main(["--figure", figure, "--config-file", config_file, "--output", str(folder), *args])
    return sorted(path.name for path in folder.iterdir())


def test_figures(tmp_path, world, capsys):
    assert run(tmp_path, "cards", "training_free", "--masks", "2") == ["cards_000001.png"]
    words = ["--words", "red star, purple cat", "--input", str(world / "val" / "000001.jpg")]
    assert run(tmp_path, "similarity", "training_free_dense", *words)[-1] == "similarity_000001.png"
    run(tmp_path, "embeddings", "training_free_dense", "--max-points", "30", "--perplexity", "5")
    assert (tmp_path / "embeddings_pixels.png").stat().st_size > 5000
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "embeddings_pixels.png")


def test_vocabulary_takes_new_words():
    vocabulary = visualize_model.chosen_vocabulary("ovshapes_val", ["red star", "purple cat"])
    assert len(vocabulary) == 73 and vocabulary.names[-1] == "purple cat" and not vocabulary.is_seen[-1]


@pytest.mark.parametrize(
    ("figure", "config", "args", "message"),
    [
        ("pseudo-masks", "training_free", [], "no such figure; it has cards"),
        (
            "similarity",
            "training_free",
            [],
            "--figure similarity: TrainingFree, as configured, has no such figure; it has cards",
        ),
        ("cards", "training_free_dense", [], "it has similarity, embeddings --points pixels"),
        ("embeddings", "training_free", ["--input", "x.jpg"], "expected a --dataset"),
        ("cards", "training_free", ["--start", "7"], "--start is 7; dataset 'ovshapes_val' has pictures 0 to 0"),
        ("cards", "training_free", ["--dataset", "nothing"], "'nothing'"),
    ],
)
def test_bad_input(tmp_path, figure, config, args, message):
    with pytest.raises(SystemExit, match="^error: ") as error:
        run(tmp_path, figure, config, *args)
    assert message in str(error.value) and "\n" not in str(error.value)
