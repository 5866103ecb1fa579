"""Two opinions on the class of a mask, the mask generator's and CLIP's, made one. Pure functions.

All published ensembles are weighted geometric means, with one exponent for seen and one for unseen classes:

    seen: Ap^(1 - alpha) Ac^alpha        unseen: Ap^(1 - beta) Ac^beta

======================  =================  ============  ==========================================
method                  alpha              beta          beside it
======================  =================  ============  ==========================================
FC-CLIP                 alpha (0.4)        beta (0.8)    :func:`normalised_logits`, :func:`with_void`
MaskCLIP++              1 - gamma          1             :func:`floored_logits`, :func:`with_void`
ZSSeg, FreeSeg          1 - lambda         lambda        Ac = 1 for empty masks
OVSeg                   lambda             lambda        Ac = 1 for empty masks
ZegFormer               1/3                2/3           :func:`averaged_over_seen`
MAFT, equation 9        1 - lambda         lambda        ``unseen_by_clip_alone``
======================  =================  ============  ==========================================
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovseg_d2.structures import Vocabulary

#: Probabilities are raised by this before their logarithm (FC-CLIP, MaskCLIP++).
FLOOR = 1e-8


def geometric_ensemble(
    proposal_probs: Tensor,
    clip_probs: Tensor,
    seen: Tensor,
    *,
    alpha: float | Tensor,
    beta: float | Tensor,
    unseen_by_clip_alone: bool = False,
) -> Tensor:
    """The formula above.

    Args:
        proposal_probs: (..., K) the generator's.
        clip_probs: (..., K) CLIP's. What is not finite in rows with exponent 0 does not matter.
        seen: (K,) bool, classes of the generator's training.
        alpha, beta: CLIP's part for seen and unseen classes, in [0, 1]: numbers, or tensors that broadcast to
            (..., K), such as (N, Q, 1) with zeros for the masks that CLIP cannot judge.
        unseen_by_clip_alone: leave the generator out for unseen classes: Ac^beta (MAFT, equation 9; the public
            implementation has the form above).

    Returns:
        (..., K) float32, in [0, 1], not normalised.
    """
    exponent = torch.where(seen, *(torch.as_tensor(x, dtype=torch.float32, device=seen.device) for x in (alpha, beta)))
    # As powers, not as sums of logarithms: 0 ** 0 and nan ** 0 are 1, where 0 * log(0) would be NaN.
    proposal_part = proposal_probs.float() ** (1 - exponent)
    if unseen_by_clip_alone:
        proposal_part = torch.where(seen, proposal_part, 1.0)
    return proposal_part * clip_probs.float() ** exponent


def normalised_logits(class_probs: Tensor) -> Tensor:
    """Logarithms (..., K) of probabilities that need not add up to one (FC-CLIP).

    Finite for zeros, too: rows in which everything has vanished become uniform, where the public implementation has
    -inf, and from it NaN.
    """
    return class_probs.clamp(min=torch.finfo(class_probs.dtype).tiny).log()


def floored_logits(class_probs: Tensor) -> Tensor:
    """log(p + 1e-8), (..., K) (MaskCLIP++)."""
    return (class_probs + FLOOR).log()


def with_void(class_logits: Tensor, void_probs: Tensor) -> Tensor:
    """Add "no object", which CLIP knows nothing of: log(cat(softmax(r) (1 - v), v) + 1e-8).

    Args:
        class_logits: (..., K).
        void_probs: (...,) the generator's probability of "no object", among all K + 1 classes.

    Returns:
        (..., K + 1) logarithms of probabilities.
    """
    void = void_probs.float()[..., None]
    return floored_logits(torch.cat([class_logits.float().softmax(-1) * (1 - void), void], dim=-1))


def averaged_over_seen(clip_probs: Tensor, seen: Tensor) -> Tensor:
    """CLIP's probability (..., K) of each seen (K,) class replaced by the mean of all seen ones (ZegFormer): among
    them, the generator decides. Without seen classes nothing changes."""
    mean = (clip_probs * seen).sum(-1, keepdim=True) / seen.sum().clamp(min=1)
    return torch.where(seen, mean, clip_probs)


def class_table(trained: Vocabulary, vocabulary: Vocabulary) -> Tensor:
    """Where a closed generator's classes are in another vocabulary.

    Returns:
        (K' + 1,) int64 in [0, K]: for each of the K' classes of ``trained`` the first class of ``vocabulary`` with a
        synonym in common; K, "no object", where there is none, and for "no object" itself.
    """
    first: dict[str, int] = {}
    for i, synonyms in enumerate(vocabulary.synonyms):
        for text in synonyms:
            first.setdefault(text, i)
    void = len(vocabulary)
    return torch.tensor([*(min(first.get(text, void) for text in texts) for texts in trained.synonyms), void])


def translated_logits(class_logits: Tensor, table: Tensor, num_classes: int) -> Tensor:
    """A closed generator's logits in another vocabulary (MaskCLIP++).

    Args:
        class_logits: (..., K' + 1), "no object" last.
        table: (K' + 1,) of :func:`class_table`.
        num_classes: K.

    Returns:
        (..., K + 1): the mean of the logits of all classes that fall on one; 0 for classes that none falls on.
    """
    sums = class_logits.new_zeros(*class_logits.shape[:-1], num_classes + 1).index_add_(-1, table, class_logits)
    return sums / torch.bincount(table, minlength=num_classes + 1).clamp(min=1)
