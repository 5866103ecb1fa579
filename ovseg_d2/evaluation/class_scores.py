"""Means over classes, also of the seen and of the unseen ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ovseg_d2.structures import Vocabulary

Array = np.ndarray


def seen_split(vocabulary: Vocabulary, trained: Vocabulary | None) -> tuple[bool, ...] | None:
    """K flags of the classes that are scored as seen: those of the dataset's zero-shot split, else relative to the
    classes of the training data (:meth:`Vocabulary.seen_in`); None if that does not divide the classes.

    Args:
        vocabulary: the K classes of the evaluated dataset.
        trained: those of the training data; None if they are not known.
    """
    seen = vocabulary.seen_in(trained)
    return seen if vocabulary.is_seen or len(set(seen)) == 2 else None


def seen_means(values: Array, is_seen: Sequence[bool]) -> tuple[float, float, float]:
    """Means of values (K,) over the seen and over the unseen classes, and their harmonic mean."""
    flags = np.array(is_seen, dtype=bool)
    seen, unseen = mean(values[flags]), mean(values[~flags])
    return seen, unseen, harmonic_mean(seen, unseen)


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b); 0 if both are 0, NaN if one is NaN."""
    return 0.0 if a == b == 0 else 2 * a * b / (a + b)


def ratio(numerator: Array, denominator: Array) -> Array:
    """Quotient, NaN where the denominator is 0."""
    nan = np.full(np.shape(numerator), np.nan)
    return np.divide(numerator, denominator, out=nan, where=np.asarray(denominator) > 0)


def mean(values: Array) -> float:
    """Mean of the values that are not NaN, NaN if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")
