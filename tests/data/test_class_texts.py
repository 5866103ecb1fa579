"""Synonyms of registered datasets, from files."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from ovseg_d2.data.vocabulary import vocabulary_from_metadata
from ovseg_d2.engine.load_config import load_config

NAME = "class_texts_of_a_test"


@pytest.fixture(autouse=True)
def dataset():
    DatasetCatalog.register(NAME, list)
    MetadataCatalog.get(NAME).set(stuff_classes=["couch", "wall-other"], evaluator_type="sem_seg")
    yield
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.mark.parametrize(
    "text",
    ["0:invalid_class_id\n1:couch, sofa\n2:wall\n", "0: couch,sofa\n1: wall", "couch, sofa\nwall:stuff\n"],
)
def test_a_file_gives_synonyms(tmp_path, text):
    path = tmp_path / "names.txt"
    path.write_text(text)
    for _ in range(2):  # a second set-up in the same process
        load_config("", ["DATASETS.CLASS_TEXTS", f"[['{NAME}', '{path}']]"])
    vocabulary = vocabulary_from_metadata(MetadataCatalog.get(NAME))
    assert vocabulary.names == ("couch", "wall-other")
    assert vocabulary.synonyms == (("couch", "sofa"), ("wall",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1:couch\n2:wall\n3:sky\n", "has 3 classes, but class_texts_of_a_test has 2"),
        ("1:couch\n2:,\n", "class 1 of .* has no name"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "names.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config("", ["DATASETS.CLASS_TEXTS", f"[['{NAME}', '{path}']]"])


def test_bad_entries(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.txt does not exist"):
        load_config("", ["DATASETS.CLASS_TEXTS", f"[['{NAME}', '{tmp_path / 'no.txt'}']]"])
    with pytest.raises(ValueError, match="'nothing' is no registered dataset"):
        load_config("", ["DATASETS.CLASS_TEXTS", "[['nothing', 'names.txt']]"])
    with pytest.raises(ValueError, match="is not a pair"):
        load_config("", ["DATASETS.CLASS_TEXTS", "[['nothing']]"])
