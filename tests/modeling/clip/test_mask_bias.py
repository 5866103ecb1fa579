"""The bias that masks put on attention."""

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ovseg_d2.modeling.clip.mask_bias import attend_masked, hard_mask_bias, soft_mask_bias

INF = float("inf")


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest result of an operation."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_soft_bias():
    masks = torch.tensor([[[[0.0, 0.4], [0.41, 0.8]], [[0.0, 0.0], [0.0, 0.0]]]])
    bias = soft_mask_bias(masks, torch.tensor([0.0, math.log(2)]))
    assert bias.shape == (1, 2, 2, 4)
    # Exactly half of the maximum is outside; an empty mask is outside everywhere.
    torch.testing.assert_close(bias[0, 0], torch.tensor([[-100.0, -100.0, 0.41, 0.8], [-100.0] * 4]))
    torch.testing.assert_close(bias[0, 1, 0], torch.tensor([-100.0, -100.0, 0.82, 1.6]))


def test_soft_bias_has_a_gradient_for_the_scale():
    scale = torch.zeros(2, requires_grad=True)
    soft_mask_bias(torch.rand(1, 3, 2, 2), scale)[..., -1].clamp(min=-1).sum().backward()
    assert scale.grad.isfinite().all()


def test_hard_bias():
    masks = torch.tensor([[[[0.0, 0.4999], [0.5, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    assert hard_mask_bias(masks).tolist() == [[[[-INF, -INF, 0.0, 0.0], [-INF] * 4]]]


def test_a_token_with_nothing_but_itself_keeps_its_own_value():
    generator = torch.Generator().manual_seed(0)
    query, own_key, own_value = torch.randn(3, 2, 4, 3, 5, generator=generator)
    key, value = torch.randn(2, 2, 4, 6, 5, generator=generator)
    bias = hard_mask_bias(torch.zeros(2, 3, 2, 3))
    torch.testing.assert_close(attend_masked(query, key, value, bias, own=(own_key, own_value)), own_value)


def test_no_matrix_of_all_pairs_of_masks():
    """Time and memory are linear in the number of masks."""
    query, own_key, own_value = torch.randn(3, 1, 1, 500, 2)
    key, value = torch.randn(2, 1, 1, 3, 2)
    with LargestTensor() as sizes:
        attend_masked(query, key, value, hard_mask_bias(torch.rand(1, 500, 1, 3)), own=(own_key, own_value))
    assert 0 < sizes.largest < 500 * 10


def test_attention_to_patches_and_oneself():
    generator = torch.Generator().manual_seed(0)
    query, own_key, own_value = torch.randn(3, 2, 4, 3, 5, generator=generator)
    key, value = torch.randn(2, 2, 4, 6, 5, generator=generator)
    bias = torch.randn(2, 1, 3, 6, generator=generator)
    alone = (query @ key.mT / 5**0.5 + bias).softmax(dim=-1) @ value
    torch.testing.assert_close(attend_masked(query, key, value, bias), alone)
    logits = torch.cat([(query * own_key).sum(-1, keepdim=True) / 5**0.5, query @ key.mT / 5**0.5 + bias], dim=-1)
    weights = logits.softmax(dim=-1)
    expected = weights[..., :1] * own_value + weights[..., 1:] @ value
    torch.testing.assert_close(attend_masked(query, key, value, bias, own=(own_key, own_value)), expected)
