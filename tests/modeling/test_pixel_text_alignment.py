"""Texts aligned with pixels, pixels projected by texts, and the two similarities of both."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovseg_d2.modeling.layers.position_encoding import SinePositionEncoding
from ovseg_d2.modeling.losses.pixel_losses import IGNORED, text_pixel_alignment_loss
from ovseg_d2.modeling.pixel_classification.pixel_text_alignment import (
    DualPixelTextTransformer,
    GlobalLocalSimilarity,
    PixelToTextTransformer,
    TextToPixelProjection,
)
from ovseg_d2.modeling.pixel_classification.text_convolution import TextKernels, text_convolution
from tests.helpers import randomise

DIM = 16
SIZES = [(1, 1), (2, 7)]  # (P, E)


def random_pair(num_prompts: int = 1, num_classes: int = 5, size: tuple[int, int] = (5, 7)) -> tuple[Tensor, Tensor]:
    """Features (2, D, h, w) and unit texts (E, P, D)."""
    generator = torch.Generator().manual_seed(num_classes)
    text = torch.randn(num_classes, num_prompts, DIM, generator=generator)
    return torch.randn(2, DIM, *size, generator=generator), F.normalize(text, dim=-1)


def lacking_gradient(module: nn.Module) -> list[str]:
    """Parameters that a backward pass has left without a gradient, or with one of zeros alone."""
    return [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


# ---- P2Tformer


def attended(layer: nn.Module, x: Tensor, dense: Tensor) -> Tensor:
    """One layer of one image, head by head: (E, D) and (D, h, w) -> (E, D)."""
    values = dense.flatten(1).T
    keys = values + SinePositionEncoding(dim=DIM)(dense[None])[0].flatten(1).T
    weights, biases = layer.attn.in_proj_weight.chunk(3), layer.attn.in_proj_bias.chunk(3)
    q, k, v = (F.linear(y, w, b) for y, w, b in zip((x, keys, values), weights, biases, strict=True))
    heads = []
    for rows_q, rows_k, rows_v in zip(*(y.chunk(layer.attn.num_heads, dim=1) for y in (q, k, v)), strict=True):
        heads.append((rows_q @ rows_k.T / rows_q.shape[1] ** 0.5).softmax(dim=1) @ rows_v)
    return layer.norm(x + layer.proj(layer.attn.out_proj(torch.cat(heads, dim=1))))


@pytest.mark.parametrize(("num_prompts", "num_classes"), SIZES)
@pytest.mark.parametrize("depth", [1, 3])
def test_texts_take_up_what_they_find_in_the_pixels(num_prompts, num_classes, depth):
    dense, text = random_pair(num_prompts, num_classes)
    module = randomise(PixelToTextTransformer(dim=DIM, num_heads=4, depth=depth))
    aligned = module(dense, text)
    assert aligned.shape == (2, num_classes, num_prompts, DIM)
    for image, rows in zip(dense, aligned, strict=True):
        updated = text.flatten(0, 1)
        for layer in module.layers:
            updated = attended(layer, updated, image)
        torch.testing.assert_close(rows.flatten(0, 1), text.flatten(0, 1) + module.residual_scale * updated)


def test_a_class_does_not_depend_on_the_others():
    dense, text = random_pair(num_classes=6)
    module = randomise(PixelToTextTransformer(dim=DIM))
    order = torch.tensor([3, 1, 5])
    torch.testing.assert_close(module(dense, text[order]), module(dense, text)[:, order])


def test_the_residual_scale_starts_small_and_can_be_fixed():
    assert PixelToTextTransformer(dim=DIM).residual_scale.tolist() == pytest.approx([0.1] * DIM)
    fixed = PixelToTextTransformer(dim=DIM, residual_scale=0.5, train_residual_scale=False)
    assert fixed.residual_scale.tolist() == [0.5] * DIM
    assert [name for name, p in fixed.named_parameters() if not p.requires_grad] == ["residual_scale"]
    dense, text = random_pair()
    with torch.no_grad():
        torch.testing.assert_close(fixed(dense, text) - text, 0.5 * fixed.layers[0](text[:, 0], dense)[:, :, None])


def test_attention_starts_from_xavier_weights():
    attn = PixelToTextTransformer(dim=64).layers[0].attn
    bound = (6 / (2 * 64)) ** 0.5
    for weight in (attn.out_proj.weight, attn.in_proj_weight[:64]):
        assert weight.abs().max() <= bound and weight.std() > 0.4 * bound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "P2T_LAYERS is 0; expected 1 or more"),
        ({"num_heads": 3}, "P2T_HEADS is 3; expected a divisor of 16"),
        ({"num_heads": 0}, "P2T_HEADS is 0; expected a divisor of 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PixelToTextTransformer(dim=DIM, **options)


def test_the_dual_transformer_aligns_pixels_too():
    dense, text = random_pair(num_prompts=2, num_classes=3)
    module = randomise(DualPixelTextTransformer(dim=DIM, num_heads=4, depth=2))
    texts, pixels = module(dense, text)
    assert texts.shape == (2, 3, 2, DIM) and pixels.shape == dense.shape
    (texts.square().sum() + pixels.square().sum()).backward()
    assert lacking_gradient(module) == []
    with torch.no_grad():
        module.pixel_residual_scale.zero_()
    torch.testing.assert_close(module(dense, text)[1], dense)


# ---- convolutions with kernels of texts


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 15])
def test_every_image_has_its_own_kernels(kernel_size):
    features = torch.randn(2, 4, 6, 3)
    kernels, bias = torch.randn(2, 5, 4, kernel_size, kernel_size), torch.randn(2, 5)
    out = text_convolution(features, kernels, bias)
    for i in range(2):
        expected = F.conv2d(features[i : i + 1], kernels[i], bias[i], padding="same")
        torch.testing.assert_close(out[i : i + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel_size", [0, 2, -1])
def test_kernels_have_a_middle(kernel_size):
    with pytest.raises(ValueError, match=f"KERNEL_SIZE is {kernel_size}; expected an odd positive number"):
        TextKernels(dim=4, channels=4, kernel_size=kernel_size)


# ---- text-to-pixel projection


@pytest.mark.parametrize(("num_prompts", "num_classes"), SIZES)
def test_projection_has_four_times_the_resolution(num_prompts, num_classes):
    dense, text = random_pair(num_prompts, num_classes)
    module = randomise(TextToPixelProjection(dim=DIM)).eval()
    aligned = text.expand(2, -1, -1, -1)
    logits = module(dense, aligned)
    assert logits.shape == (2, num_classes, 20, 28)
    rows = module.text_kernels(aligned.mean(dim=2))
    torch.testing.assert_close(logits, text_convolution(module.project(dense), *rows))


def test_an_odd_dimension_cannot_be_halved():
    with pytest.raises(ValueError, match="dim is 15; expected an even number"):
        TextToPixelProjection(dim=15)


@pytest.mark.parametrize("kind", ["bce", "mse"])
@pytest.mark.parametrize("num_classes", [1, 2, 7])
@pytest.mark.parametrize("ignore_everything", [False, True])
def test_the_loss_reaches_every_parameter(kind, num_classes, ignore_everything):
    dense, text = random_pair(num_classes=num_classes)
    labels = torch.randint(IGNORED, num_classes, (2, 39, 54))
    if ignore_everything:
        labels.fill_(IGNORED)
    alignment = randomise(PixelToTextTransformer(dim=DIM, depth=2))
    projection = randomise(TextToPixelProjection(dim=DIM))
    dense.requires_grad_()
    loss = text_pixel_alignment_loss(projection(dense, alignment(dense, text)), labels, kind)
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert lacking_gradient(alignment) == [] and lacking_gradient(projection) == []
    assert dense.grad.isfinite().all() and (dense.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


# ---- similarities


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 15])
@pytest.mark.parametrize(("num_prompts", "num_classes"), SIZES)
def test_similarities(kernel_size, num_prompts, num_classes):
    dense, text = random_pair(num_prompts, num_classes)
    text = 3 * torch.stack([text, text.flip(-1)])
    module = randomise(GlobalLocalSimilarity(dim=DIM, kernel_size=kernel_size))
    cosine, local = module(dense, text)
    assert cosine.shape == (2, num_prompts, num_classes, 5, 7) and local.shape == (2, num_classes, 5, 7)
    image, prompt, entry, row, column = 1, num_prompts - 1, num_classes - 1, 4, 2
    pixel, words = dense[image, :, row, column], text[image, entry]
    torch.testing.assert_close(cosine[image, prompt, entry, row, column], F.cosine_similarity(pixel, words[prompt], 0))
    rows = module.text_kernels.weight @ F.normalize(words.mean(0), dim=0) + module.text_kernels.bias
    taps = rows[:-1].view(DIM, -1).softmax(dim=1).view(DIM, kernel_size, kernel_size)
    half = kernel_size // 2
    around = F.pad(F.normalize(dense[image], dim=0), [half] * 4)
    around = around[:, row : row + kernel_size, column : column + kernel_size]
    torch.testing.assert_close(local[image, entry, row, column], (taps * around).sum() + rows[-1])


def test_kernels_can_stay_as_they_are():
    dense, text = random_pair()
    module = randomise(GlobalLocalSimilarity(dim=DIM, normalise_kernels=False))
    kernels, bias = module.kernels(text.expand(2, -1, -1, -1))
    torch.testing.assert_close((kernels, bias), module.text_kernels(text[:, 0].expand(2, -1, -1)))
    taps = GlobalLocalSimilarity(dim=DIM).kernels(text.expand(2, -1, -1, -1))[0].sum(dim=(-2, -1))
    torch.testing.assert_close(taps, torch.ones(2, 5, DIM))


def test_all_images_can_have_the_same_texts():
    dense, text = random_pair()
    module = randomise(GlobalLocalSimilarity(dim=DIM))
    torch.testing.assert_close(module(dense, text[None]), module(dense, text.expand(2, -1, -1, -1)))


def test_without_a_local_similarity_nothing_is_trained():
    dense, text = random_pair()
    module = GlobalLocalSimilarity(dim=DIM, kernel_size=None)
    cosine, local = module(dense, text[None])
    assert cosine.shape == (2, 1, 5, 5, 7) and local is None and not list(module.parameters())


@pytest.mark.parametrize("num_classes", [1, 2, 7])
def test_similarities_reach_every_parameter(num_classes):
    dense, text = random_pair(num_classes=num_classes)
    alignment, similarity = randomise(PixelToTextTransformer(dim=DIM)), randomise(GlobalLocalSimilarity(dim=DIM))
    cosine, local = similarity(dense, alignment(dense, text))
    (cosine.square().sum() + local.square().sum()).backward()
    assert lacking_gradient(alignment) == [] and lacking_gradient(similarity) == []


def test_cosines_are_float32_under_autocast():
    dense, text = random_pair()
    module = GlobalLocalSimilarity(dim=DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosine = module.global_similarity(dense, text[None])
    assert cosine.dtype == torch.float32
    torch.testing.assert_close(cosine, module.global_similarity(dense, text[None]))


def test_a_batch_is_its_images():
    dense, text = random_pair(num_prompts=2)
    alignment, similarity = randomise(PixelToTextTransformer(dim=DIM)), randomise(GlobalLocalSimilarity(dim=DIM))
    projection = randomise(TextToPixelProjection(dim=DIM)).eval()

    def run(images: Tensor) -> tuple[Tensor, ...]:
        aligned = alignment(images, text)
        return aligned, projection(images, aligned), *similarity(images, aligned)

    alone = [run(image[None]) for image in dense]
    torch.testing.assert_close(run(dense), tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))
