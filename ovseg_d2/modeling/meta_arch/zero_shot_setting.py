"""What a zero-shot training knows of the unseen classes (ZegCLIP, arXiv 2212.03588; LDVC, section 3.1)."""

from __future__ import annotations

from ovseg_d2.modeling.losses.pseudo_labels import unseen_ids
from ovseg_d2.structures import Vocabulary

#: Nothing; their names and where they are, but not which is which; everything.
SETTINGS = ("inductive", "transductive", "supervised")


def check_setting(setting: str, *, trained: Vocabulary | None, weights: str, key: str) -> None:
    """Compare a setting with the data and the weights that a training starts from.

    Args:
        setting: one of :data:`SETTINGS`.
        trained: classes of the training data; None: not known, as in an evaluation elsewhere.
        weights: ``MODEL.WEIGHTS``.
        key: of the config that holds the setting, for errors.

    Raises:
        ValueError: another setting; inductive training on a set that names unseen classes; transductive on one that
            names none, or without weights of an inductive training.
    """
    if setting not in SETTINGS:
        raise ValueError(f"{key} is {setting!r}; allowed are {', '.join(SETTINGS)}")
    if setting == "transductive" and not weights:
        raise ValueError(
            f"{key} is 'transductive', so that the model labels the unseen classes itself, and MODEL.WEIGHTS is empty; "
            "expected the checkpoint of an inductive training, halfway in the public recipes"
        )
    if trained is None:
        return
    unseen = unseen_ids(trained)
    if setting == "inductive" and unseen:
        raise ValueError(
            f"{key} is 'inductive', but DATASETS.TRAIN names {len(unseen)} unseen classes of {len(trained)}, the first "
            f"is {trained.names[unseen[0]]!r}; expected the set of the seen classes (base, seen), or 'transductive'"
        )
    if setting == "transductive" and not unseen:
        raise ValueError(
            f"{key} is 'transductive', but none of the {len(trained)} classes of DATASETS.TRAIN is unseen in a "
            "zero-shot split; expected the set of all classes with its split"
        )
