"""A generator's masks as CLIP sees them: its own copy of the images, and masks on that copy."""

import pytest
import torch
from torch.nn import functional as F

from ovseg_d2.modeling.clip.build import build_clip
from ovseg_d2.modeling.clip.image_encoder import CLIP_PIXEL_MEAN, CLIP_PIXEL_STD
from ovseg_d2.modeling.mask_classification.crops import CropEncoder
from ovseg_d2.modeling.mask_classification.mask_encoder import MaskEncoder, divisor_of
from ovseg_d2.structures import ImageBatch, MaskProposals
from tests.helpers import randomise

MEAN, STD = (100.0, 120.0, 90.0), (50.0, 60.0, 70.0)
SIZES = [(40, 64), (48, 30)]


def encoder(resize="none", input_size=0, **options):
    return MaskEncoder(pixel_mean=MEAN, pixel_std=STD, resize=resize, input_size=input_size, **options)


@pytest.fixture(scope="module")
def visual():
    options = {"mask_mode": "maft", "start_layer": 2, "last_block": "none"}
    return randomise(build_clip("OVShapes-ViT", visual_kwargs=options, with_text=False).visual).eval()


def batch(padding=0.0):
    """Images of SIZES with the generator's normalisation, in a padded batch, and their pixels."""
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randint(0, 256, (3, *size), generator=generator).float() for size in SIZES]
    tensor = torch.full((2, 3, 64, 64), padding)
    for row, image, (h, w) in zip(tensor, pixels, SIZES, strict=True):
        row[:, :h, :w] = (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return ImageBatch(tensor=tensor, image_sizes=SIZES, image_ids=[0, 1]), pixels


def clip_normalised(image):
    return (image - torch.tensor(CLIP_PIXEL_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_PIXEL_STD).view(3, 1, 1)


def test_a_copy_of_the_same_size():
    images, pixels = batch(padding=7.0)
    copy = encoder().clip_copy(images, divisor=8)
    assert copy.image_sizes == SIZES and copy.padded_size == (48, 64)  # padded anew, as little as needed
    for row, image, (h, w) in zip(copy.tensor, pixels, SIZES, strict=True):
        torch.testing.assert_close(row[:, :h, :w], clip_normalised(image))
        assert not row[:, h:].any() and not row[:, :, w:].any()


def test_the_padded_batch_in_a_square():
    """MAFT: zeros of CLIP's normalisation in the padding, then the whole of it is squeezed."""
    images, pixels = batch(padding=7.0)
    copy = encoder("padded_square", 24).clip_copy(images)
    assert copy.image_sizes == [(24, 24)] * 2
    for row, image in zip(copy.tensor, pixels, strict=True):
        height, width = image.shape[1:]
        padded = F.pad(clip_normalised(image), (0, 64 - width, 0, 64 - height))
        expected = F.interpolate(padded[None], size=(24, 24), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize(("resize", "sizes"), [("square", [(20, 20)] * 2), ("short", [(20, 32), (32, 20)])])
def test_copies_of_other_sizes(resize, sizes):
    images, pixels = batch()
    copy = encoder(resize, 20).clip_copy(images, divisor=4)
    assert copy.image_sizes == sizes
    expected = F.interpolate(clip_normalised(pixels[1])[None], size=sizes[1], mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(copy.tensor[1, :, : sizes[1][0], : sizes[1][1]], expected)


@pytest.mark.parametrize(("resize", "input_size"), [("none", 0), ("square", 32), ("short", 24), ("padded_square", 32)])
def test_masks_follow_the_images(resize, input_size):
    """A mask that is the image's own brightness stays so on CLIP's copy."""
    images, _ = batch()
    module = encoder(resize, input_size)
    copy = module.clip_copy(images, divisor=8)
    maps = images.tensor * module.scale + module.shift
    for row, (h, w) in zip(maps, SIZES, strict=True):
        row[:, h:], row[:, :, w:] = 0.0, 0.0
    moved = module.to_frame(maps, images, copy)
    if resize == "padded_square":
        moved = F.interpolate(moved, size=copy.padded_size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(moved, copy.tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("align_corners", [False, True])
def test_mask_logits_at_the_size_of_the_images(align_corners):
    images, _ = batch()
    logits = torch.randn(2, 3, 16, 16)
    found = encoder(align_corners=align_corners).resized(logits, images)
    expected = F.interpolate(logits, size=(64, 64), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(found, expected)


@torch.no_grad()
@pytest.mark.parametrize(("resize", "input_size"), [("none", 0), ("padded_square", 40)])
def test_one_pass(visual, resize, input_size):
    images, _ = batch()
    logits = 4 * torch.randn(2, 5, 16, 16, generator=torch.Generator().manual_seed(3))
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    module = encoder(resize, input_size)
    embeds, kept = module(visual, images, MaskProposals(mask_logits=logits, valid=valid))
    assert embeds.shape == (2, 5, visual.embed_dim) and kept is valid
    copy = module.clip_copy(images, divisor=8)
    masks = module.to_frame(module.resized(logits, images).sigmoid(), images, copy)
    torch.testing.assert_close(embeds, visual.encode_masks(visual(copy.tensor), masks))
    # Masks do not see each other: any number of them, in any order.
    few, _ = module(visual, images, MaskProposals(mask_logits=logits[:, [3, 1]]))
    torch.testing.assert_close(few, embeds[:, [3, 1]], rtol=1e-4, atol=1e-5)
    assert float((embeds - embeds.mean(1, keepdim=True)).abs().max()) > 1e-3


@torch.no_grad()
def test_crops_come_from_the_image_as_it_is(visual):
    images, _ = batch()
    logits = torch.full((2, 3, 64, 64), -9.0)
    logits[:, 0, 4:20, 6:26], logits[:, 1, 10:, :] = 9.0, 9.0
    crops = CropEncoder(style="mask_crop", size=24)
    # A size of CLIP's copy is that of one pass, not of crops.
    found = [
        encoder(resize, 40, crops=crops)(visual, images, MaskProposals(mask_logits=logits))
        for resize in ("none", "square")
    ]
    torch.testing.assert_close(found[0], found[1])
    embeds, valid = found[0]
    assert valid.tolist() == [[True, True, False]] * 2 and not embeds[:, 2].any()


@torch.no_grad()
@pytest.mark.parametrize("style", ["mask_crop", "cropmask", "crop"])
def test_crops_are_of_the_same_pixels_whatever_the_padding(visual, style):
    """Masks come on the frame of the batch, which need not be padded to multiples of 32."""
    images, _ = batch()
    logits = torch.full((2, 2, 64, 64), -9.0)
    logits[:, 0, 4:20, 6:26], logits[:, 1, 10:38, 3:29] = 9.0, 9.0
    wider = ImageBatch(F.pad(images.tensor, (0, 12, 0, 8)), image_sizes=SIZES, image_ids=[0, 1])
    module = encoder(crops=CropEncoder(style=style, size=24))
    expected, _ = module(visual, images, MaskProposals(mask_logits=logits))
    found, _ = module(visual, wider, MaskProposals(mask_logits=F.pad(logits, (0, 12, 0, 8), value=-9.0)))
    torch.testing.assert_close(found, expected)


def test_divisors():
    assert divisor_of(build_clip("OVShapes-ViT", with_text=False).visual) == 8
    assert divisor_of(build_clip("OVShapes-RN", with_text=False).visual) == 32


@pytest.mark.parametrize(
    ("resize", "input_size", "message"),
    [
        ("squared", 40, "CLIP.RESIZE: 'squared'; expected one of none, short, square, padded_square"),
        ("padded_square", 0, "CLIP.INPUT_SIZE: 0; expected pixels, as RESIZE is 'padded_square'"),
        ("short", -1, "CLIP.INPUT_SIZE: -1; expected pixels, as RESIZE is 'short'"),
    ],
)
def test_bad_options(resize, input_size, message):
    with pytest.raises(ValueError, match=message):
        encoder(resize, input_size)
