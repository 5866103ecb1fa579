"""Vocabularies from metadata, strings and files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.data import MetadataCatalog

import ovseg_d2.data  # noqa: F401  registers the datasets
from ovseg_d2.data import vocabulary_from_metadata
from ovseg_d2.data.vocabulary import load_vocabulary, vocabulary_from_file, vocabulary_from_string
from ovseg_d2.structures import Vocabulary


@pytest.mark.parametrize(
    ("name", "num_classes", "num_things"),
    [
        ("coco_2017_val_panoptic_with_sem_seg", 133, 80),
        ("coco_2017_val", 80, 80),
        ("ade20k_panoptic_val", 150, 100),
        ("ade20k_instance_val", 100, 100),
        ("ade20k_sem_seg_val", 150, 0),
        ("cityscapes_fine_panoptic_val", 19, 8),
        ("ovshapes_val", 72, 64),
        ("ovshapes_train_seen", 54, 48),
        ("ovshapes_train_seen_instance", 48, 48),
        ("ovshapes_val_sem_seg", 72, 0),
    ],
)
def test_registered_data_sets(name: str, num_classes: int, num_things: int) -> None:
    vocabulary = vocabulary_from_metadata(MetadataCatalog.get(name))
    assert len(vocabulary) == num_classes and sum(vocabulary.is_thing) == num_things
    assert all(name == name.strip() for name in vocabulary.names)


def test_things_are_where_their_ids_say() -> None:
    metadata = SimpleNamespace(
        stuff_classes=["sky", "cat ", "road", "dog"],
        thing_classes=["cat ", "dog"],
        thing_dataset_id_to_contiguous_id={17: 1, 18: 3},
    )
    vocabulary = vocabulary_from_metadata(metadata)
    assert vocabulary.names == ("sky", "cat", "road", "dog")
    assert vocabulary.is_thing == (False, True, False, True)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (SimpleNamespace(name="empty"), "'empty' is registered without stuff_classes or thing_classes"),
        (MetadataCatalog.get("coco_2017_val_panoptic_separated"), "numbers things and stuffs separately"),
    ],
)
def test_unusable_metadata(metadata: SimpleNamespace, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocabulary_from_metadata(metadata)


def test_synonyms_and_split_of_metadata():
    classes = ["cat", "sky "]
    extras = {"class_synonyms": [("cat", "kitten "), ["sky"]], "class_is_seen": [1, 0]}
    for names in ({"thing_classes": classes}, {"stuff_classes": classes}):
        vocabulary = vocabulary_from_metadata(SimpleNamespace(**names, **extras))
        assert vocabulary.synonyms == (("cat", "kitten"), ("sky",))
        assert vocabulary.is_seen == (True, False)


# ---- strings

RED_STAR_ON_GRASS = Vocabulary(
    names=("red star", "grass"), is_thing=(True, False), synonyms=(("red star", "scarlet star"), ("grass", "lawn"))
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red star,blue  ring", Vocabulary(names=("red star", "blue ring"), is_thing=(True, True))),
        (" cat , sky:stuff", Vocabulary(names=("cat", "sky"), is_thing=(True, False))),
        ("cat:thing, sky: STUFF ", Vocabulary(names=("cat", "sky"), is_thing=(True, False))),
        ("ratio 3:10", Vocabulary(names=("ratio 3:10",), is_thing=(True,))),
        ("red star, scarlet star | grass, lawn, grass:stuff", RED_STAR_ON_GRASS),
    ],
)
def test_strings(text, expected):
    assert vocabulary_from_string(text) == load_vocabulary(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ", "the vocabulary has no classes"),
        ("cat,,dog", "class 2: empty name"),
        ("cat, dog,", "class 3: empty name"),
        ("cat|:stuff", "class 2: empty name"),
        ("cat|dog,,hound", "class 2: empty name among 'dog', '', 'hound'"),
        ("cat, dog, cat:stuff", "class 3: 'cat' is there already .*class 1.; names must differ"),
    ],
)
def test_unusable_strings(text, message):
    with pytest.raises(ValueError, match=message) as error:
        vocabulary_from_string(text)
    assert "\n" not in str(error.value)


# ---- files


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "# a scene\n\nred star, scarlet star  # a thing\ngrass, lawn:stuff\n"),
        ("windows.TXT", "\ufeffred star, scarlet star:thing\r\ngrass, lawn :stuff"),
        ("lines.json", '["red star, scarlet star", "grass, lawn:stuff"]'),
        (
            "objects.json",
            '[{"name": "red star", "synonyms": ["scarlet star"]},'
            ' {"name": "grass", "synonyms": ["grass", "lawn"], "isthing": 0, "id": 7, "color": [1, 2, 3]}]',
        ),
    ],
)
def test_files(tmp_path, name, text):
    path = written(tmp_path, name, text)
    assert vocabulary_from_file(path) == load_vocabulary(str(path)) == RED_STAR_ON_GRASS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "# nothing\n\n", "a.txt has no classes"),
        ("a.txt", "cat\n\ndog,, hound\n", "a.txt, line 3: empty name among 'dog', '', 'hound'"),
        ("a.txt", "cat\n:stuff\n", "a.txt, line 2: empty name"),
        ("a.txt", "cat\n# pets\ncat, kitten\n", "a.txt, line 3: 'cat' is there already .*line 1"),
        ("a.csv", "cat", "a.csv: unknown suffix '.csv', allowed are .txt, .json"),
        ("a.json", "[1", "a.json is not valid JSON: .*line 1 column 3"),
        ("a.json", '{"names": []}', "a.json holds a dict; expected a list of classes"),
        ("a.json", "[]", "a.json has no classes"),
        ("a.json", '["cat", 3]', "a.json, entry 2 is a int; expected a name or an object"),
        ("a.json", '[{"title": "cat"}]', "entry 1 has the unknown key 'title'; allowed are name, synonyms, isthing"),
        ("a.json", '[{"synonyms": ["cat"]}]', "entry 1: name is None; expected a text"),
        ("a.json", '[{"name": "cat", "synonyms": "kitten"}]', "synonyms is 'kitten'; expected a list of texts"),
        ("a.json", '[{"name": "cat", "isthing": "no"}]', "isthing is 'no'; expected true, false, 1 or 0"),
        ("a.json", '[{"name": " "}]', "entry 1: empty name"),
    ],
)
def test_unusable_files(tmp_path, name, text, message):
    path = written(tmp_path, name, text)
    with pytest.raises(ValueError, match=message) as error:
        vocabulary_from_file(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"cat\n\xff\xfe")
    with pytest.raises(ValueError, match="is not a text in UTF-8 .*byte 4"):
        vocabulary_from_file(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="b.txt does not exist"):
        load_vocabulary(str(tmp_path / "b.txt"))


def test_a_registered_dataset():
    assert load_vocabulary("ovshapes_val") == vocabulary_from_metadata(MetadataCatalog.get("ovshapes_val"))
