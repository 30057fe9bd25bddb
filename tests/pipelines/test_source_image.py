import math

import numpy as np
import PIL.Image
import pytest
import torch
from images import photo

from paella_diffusers.pipelines.source_image import SizeRule, SourceImage, feather, prepare_source

RULE = SizeRule(own_side=64, multiple=16, vae_scale_factor=4)  # the embedded model's


def tensor(image: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def generated(source: SourceImage, seed: int = 0) -> torch.Tensor:
    """What a model might make: no pixel of it is in any picture."""
    return torch.rand(source.image.shape, generator=torch.Generator().manual_seed(seed)) / 300 + 1 / 600


def rectangle(width: int, height: int, box: tuple[int, int, int, int]) -> PIL.Image.Image:
    mask = PIL.Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


# ---------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "width, height, expected",
    [
        (64, 64, (64, 64)),
        (192, 32, (192, 32)),  # from half the model's side to three times
        (192, 192, (192, 192)),
        (500, 300, (80, 48)),
        (4032, 3024, (64, 48)),  # multiples of 16, but large
        (208, 64, (112, 32)),
        (60, 60, (64, 64)),
        (40, 30, (64, 48)),  # small ones are not generated small
        (16, 16, (64, 64)),
        (1, 1, (64, 64)),
        (4000, 100, (192, 32)),
    ],
)
def test_sizes(width, height, expected):
    assert RULE(height, width) == expected[::-1]


def test_every_size_becomes_one_that_the_model_allows():
    generator = torch.Generator().manual_seed(0)
    released = SizeRule(own_side=256, multiple=32, vae_scale_factor=4)
    for height, width in torch.randint(1, 5000, (200, 2), generator=generator).tolist():
        for rule in (RULE, released):
            size = rule(height, width)
            rule.check(*size)
            assert rule.own_side / 2 <= min(size) and max(size) <= 3 * rule.own_side
            if 1 / 3 < width / height < 3:  # nearly the model's own area, nearly the same proportions
                assert 0.5 < size[0] * size[1] / rule.own_side**2 < 2
                assert abs(math.log(size[0] * width / (size[1] * height))) < 0.25


@pytest.mark.parametrize(
    "size, message",
    [
        ((100, 64), "multiples of 16, got 100 and 64: the nearest are 96 and 64"),
        ((1, 64), "the nearest are 16 and 64"),
        ((0, 64), "multiples of 16, got 0 and 64: the nearest are 16 and 64"),
        ((64, "64"), "`width` must be an integer, of the multiples of 16, got '64'"),
        ((64, 64.0), "`width` must be an integer, of the multiples of 16, got 64.0"),
        ((64, True), "`width` must be an integer, of the multiples of 16, got True"),
    ],
)
def test_wrong_sizes_are_named(size, message):
    with pytest.raises(ValueError, match=message):
        RULE.check(*size)


# ------------------------------------------------------------------------------------------------------- image to image


def test_an_image_that_fits_is_not_touched():
    image = photo(80, 48)
    source = prepare_source(image, RULE)
    assert torch.equal(source.image, tensor(image))
    images = generated(source).bfloat16()
    assert source.restore(images) is images or torch.equal(source.restore(images), images)


@pytest.mark.parametrize("kind", ["pil", "array", "tensor"])
def test_results_have_the_size_of_the_image(kind):
    image = photo(500, 300)
    kinds = {"pil": image, "array": np.array(image) / 255, "tensor": tensor(image)[0]}
    source = prepare_source(kinds[kind], RULE)
    assert source.image.shape == (1, 3, 48, 80)
    back = source.restore(source.image)
    assert back.shape == (1, 3, 300, 500)
    assert (back - tensor(image)).abs().mean() < 0.02  # the same picture, without its grain


def test_explicit_sizes():
    image = photo(500, 300)
    for size, expected in [
        ({"height": 96, "width": 64}, (96, 64)),
        ({"width": 160}, (96, 160)),  # in proportion
        ({"height": 96}, (96, 160)),
        ({"width": 16}, (16, 16)),
    ]:
        source = prepare_source(image, RULE, **size)
        assert source.image.shape[-2:] == expected == source.restore(source.image).shape[-2:]


def test_fill_keeps_proportions_and_the_whole_image():
    image = photo(120, 60)
    source = prepare_source(image, RULE, height=64, width=64, resize_mode="fill")
    stretched = prepare_source(image, RULE, height=32, width=64).image
    assert (source.image[..., 16:48, :] - stretched).abs().max() < 0.02
    edges = source.image[..., [1, -2], :], stretched[..., [0, -1], :]
    assert (edges[0] - edges[1]).abs().max() < 0.1  # rows are repeated above and below
    image = photo(520, 300)  # 80 × 48 is 520 × 312
    source = prepare_source(image, RULE, resize_mode="fill")
    assert source.box == (0, -6, 520, 306)
    assert (source.restore(source.image) - tensor(image)).abs().mean() < 0.02  # what surrounds it is cut off


def test_crop_takes_the_middle():
    image = photo(500, 300)
    explicit = prepare_source(image, RULE, height=64, width=64, resize_mode="crop")
    middle = image.crop((100, 0, 400, 300))
    assert torch.equal(explicit.image, prepare_source(middle, RULE, height=64, width=64).image)
    assert explicit.restore(explicit.image).shape == (1, 3, 64, 64)
    image = photo(520, 300)  # 80 × 48 is 500 × 300
    source = prepare_source(image, RULE, resize_mode="crop")
    back = source.restore(source.image)
    assert back.shape == (1, 3, 300, 500)  # the crop's own proportions
    assert (back - tensor(image.crop((10, 0, 510, 300)))).abs().mean() < 0.02


def test_images_of_several_sizes():
    images = [photo(500, 300), photo(64, 64)]
    with pytest.raises(ValueError, match="several sizes, 64×64, 500×300: give `height` and `width`"):
        prepare_source(images, RULE)
    source = prepare_source(images, RULE, height=64, width=64)
    assert source.image.shape == (2, 3, 64, 64) == source.restore(source.image).shape
    assert torch.equal(source.image[1:], tensor(images[1]))


def test_large_enlargements_are_said_once(caplog):
    for size, said in [((160, 96), 0), ((500, 300), 1)]:
        caplog.clear()
        source = prepare_source([photo(*size)] * 2, RULE, height=None)
        source.warn_if_enlarged(source.image)
        assert len(caplog.records) == said
    assert "enlarged 6.2 times to the size of `image`: they were generated at 80×48 pixels" in caplog.text


# ------------------------------------------------------------------------------------------------------------ inpainting


@pytest.mark.parametrize("size", [(64, 64), (500, 300), (40, 30), (301, 77)])
@pytest.mark.parametrize("options", [{}, {"resize_mode": "fill"}, {"padding_mask_crop": 10}], ids=str)
def test_pixels_outside_the_mask_stay_to_the_last_bit(size, options):
    image = photo(*size)
    mask = rectangle(*size, (size[0] // 4 + 1, size[1] // 3, size[0] // 2, size[1] // 2 + 3))
    source = prepare_source(image, RULE, mask_image=mask, **options)
    results = source.restore(generated(source))
    assert results.shape == (1, 3, size[1], size[0])
    back = np.asarray((results[0] * 255).round().byte().permute(1, 2, 0))
    masked = np.asarray(mask) > 0
    assert (back[~masked] == np.asarray(image)[~masked]).all()
    assert (back[masked] <= 2).all()  # all of it is new


def test_float_pixels_outside_the_mask_stay_too():
    image = torch.rand(3, 100, 150, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(100, 150)
    mask[10:50, 20:60] = 1
    source = prepare_source(image, RULE, mask_image=mask)
    results = source.restore(generated(source).bfloat16())
    assert torch.equal(results[0][:, mask == 0], image[:, mask == 0])


@pytest.mark.parametrize("options", [{"resize_mode": "crop"}, {"height": 64, "width": 96}, {"height": 48, "width": 80}])
def test_pixels_outside_the_mask_at_other_sizes(options):
    """They are those of the crop, or of the image at the size that was asked for."""
    image, mask = photo(520, 300), rectangle(520, 300, (100, 100, 200, 200))
    source = prepare_source(image, RULE, mask_image=mask, **options)
    plain = prepare_source(image, RULE, **options)
    expected = tensor(image.crop((10, 0, 510, 300))) if "resize_mode" in options else plain.image
    results = source.restore(generated(source))
    masked = results.amax(1)[0] < 0.01
    assert results.shape == expected.shape
    assert torch.equal(results[0][:, ~masked], expected[0][:, ~masked])
    assert 0.9 < masked.float().mean() * 520 * 300 / 100**2 < 1.2


def test_a_token_is_generated_if_any_masked_pixel_lies_on_it():
    mask = np.zeros((64, 64), np.float32)
    mask[17, 30] = 1
    source = prepare_source(photo(64, 64), RULE, mask_image=mask)
    assert source.mask.nonzero().tolist() == [[0, 4, 7]]
    thin = rectangle(1200, 900, (500, 0, 501, 900))  # one pixel wide, a twentieth of a pixel at 64 × 48
    source = prepare_source(photo(1200, 900), RULE, mask_image=thin)
    assert source.mask[0].any(1).all() and source.mask.sum() == 12


@pytest.mark.parametrize("mask_size", [(500, 300), (250, 150), (1000, 600), (50, 30)])
def test_a_mask_of_another_size_is_resized(mask_size):
    width, height = mask_size
    mask = rectangle(width, height, (width // 5, height // 5, width // 2, height // 2))
    source = prepare_source(photo(500, 300), RULE, mask_image=mask)
    expected = torch.zeros(300, 500)
    expected[60:150, 100:250] = 1
    assert torch.equal(source.blend[0, 0], expected)
    line = rectangle(1000, 600, (500, 0, 501, 600))
    assert prepare_source(photo(500, 300), RULE, mask_image=line).blend.sum() == 300  # a thin line does not get lost


def test_soft_masks_count_from_one_half():
    soft = torch.full((64, 64), 0.49)
    soft[16, 16] = 0.5
    assert prepare_source(photo(64, 64), RULE, mask_image=soft).blend.sum() == 1


def test_transparent_parts_of_a_mask_are_black():
    mask = PIL.Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 16, 16))
    assert prepare_source(photo(64, 64), RULE, mask_image=mask).blend.sum() == 256


def test_kinds_of_masks_are_the_same():
    mask = torch.zeros(48, 80)
    mask[5:14, 20:33] = 1
    array = mask.numpy()
    pil = PIL.Image.fromarray((array * 255).astype(np.uint8))
    sixteen_bits = PIL.Image.fromarray((array * 65535).astype(np.uint16))
    arrays = [array, array[..., None], array > 0, array.astype(np.int64)[None]]
    for kind in [pil, pil.convert("RGB"), [pil], sixteen_bits, *arrays, mask, mask[None], mask[None, None], mask.long()]:
        assert torch.equal(prepare_source(photo(80, 48), RULE, mask_image=kind).blend[0, 0], mask)


def test_several_images_and_masks():
    images, masks = [photo(100, 60)] * 2, [rectangle(100, 60, (0, 0, 50, 60)), rectangle(50, 30, (25, 0, 50, 30))]
    source = prepare_source(images, RULE, mask_image=masks)
    one = prepare_source(images[0], RULE, mask_image=masks)
    assert len(source.image) == len(one.image) == 2 and torch.equal(source.mask, one.mask)
    results = source.restore(generated(source).repeat_interleave(3, dim=0))  # three for each
    assert torch.equal(results[:3, ..., 50:], source.original[0].expand(3, 3, 60, 100)[..., 50:])
    assert torch.equal(results[3:, ..., :50], source.original[0].expand(3, 3, 60, 100)[..., :50])
    with pytest.raises(ValueError, match="`mask_image` has 3 masks for 2 images: pass one, or one each"):
        prepare_source(images, RULE, mask_image=[masks[0]] * 3)


def test_padding_mask_crop():
    image, mask = photo(1000, 600), rectangle(1000, 600, (300, 200, 340, 220))
    source = prepare_source(image, RULE, mask_image=mask, padding_mask_crop=20)
    left, top, right, bottom = source.box
    assert source.image.shape == (1, 3, 48, 80)  # more detail than the mask would have in the whole
    assert left <= 280 and top <= 180 and right >= 360 and bottom >= 240 and right - left < 110
    assert (right - left) / (bottom - top) == pytest.approx(80 / 48, rel=0.03)
    expected = prepare_source(image.crop(source.box), RULE, height=48, width=80).image
    assert torch.equal(source.image, expected)
    assert source.mask.float().mean() == pytest.approx(40 * 20 / ((right - left) * (bottom - top)), rel=0.5)
    explicit = prepare_source(image, RULE, mask_image=mask, padding_mask_crop=20, height=64, width=64)
    assert explicit.image.shape == (1, 3, 64, 64) and explicit.restore(explicit.image).shape == (1, 3, 600, 1000)
    black = prepare_source(image, RULE, mask_image=rectangle(1000, 600, (0, 0, 0, 0)), padding_mask_crop=20)
    assert torch.equal(black.restore(generated(black)), tensor(image))


def test_padding_mask_crop_in_an_image_too_narrow_for_the_size():
    image, mask = photo(500, 40), rectangle(500, 40, (100, 0, 300, 40))
    source = prepare_source(image, RULE, mask_image=mask, padding_mask_crop=0, height=64, width=64)
    assert source.box[1] < 0 and source.box[3] > 40  # its edges are repeated, nothing is stretched
    results = source.restore(generated(source))
    assert torch.equal(results[..., :100], tensor(image)[..., :100]) and results[..., 100:300].max() < 0.01


def test_without_original_pixels():
    image, mask = photo(500, 300), rectangle(500, 300, (100, 100, 200, 200))
    source = prepare_source(image, RULE, mask_image=mask, keep_original_pixels=False)
    assert source.restore(generated(source)).max() < 0.01
    part = prepare_source(image, RULE, mask_image=mask, keep_original_pixels=False, padding_mask_crop=10)
    results, (left, top, right, bottom) = part.restore(generated(part)), part.box
    assert results[..., top:bottom, left:right].max() < 0.01
    assert torch.equal(results[..., :top, :], tensor(image)[..., :top, :])


def test_feather_falls_from_one_to_zero():
    mask = torch.zeros(1, 1, 9, 40)
    mask[..., 10:20] = 1
    row = feather(mask, radius=3)[0, 0, 4]
    assert (row[10:20] == 1).all()
    assert (row[20:27].diff() < 0).all()
    assert (row[:4] == 0).all() and (row[26:] == 0).all() and row[25] > 0
    assert torch.equal(feather(mask, radius=0), mask)
    assert (feather(mask, radius=10**9) == 1).all()  # everything is within its reach
    source = prepare_source(photo(48, 32), RULE, mask_image=mask[0, 0].repeat(4, 1)[:32], feather_radius=3)
    assert torch.equal(source.blend, feather((source.blend == 1).float(), 3))


# ----------------------------------------------------------------------------------------------------------- outpainting


@pytest.mark.parametrize(
    "padding, generated_size, margins",
    [
        ((16, 0, 32, 16), (112, 80), (4, 0, 8, 4)),
        ((18, 3, 14, 13), (96, 80), (4, 0, 3, 3)),
        ((8, 0, 0, 0), (80, 64), (4, 0, 0, 0)),  # a little more is generated
        ((0, 0, 3, 5), (80, 80), (0, 0, 4, 4)),
    ],
)
def test_padding_of_an_image_that_fits(padding, generated_size, margins):
    image = photo(64, 64)
    source = prepare_source(image, RULE, padding=padding)
    left, top, right, bottom = padding
    assert source.image.shape[-2:] == generated_size[::-1] and source.margins == margins
    results = source.restore(generated(source))
    assert results.shape[-2:] == (64 + top + bottom, 64 + left + right)
    assert torch.equal(results[..., top : top + 64, left : left + 64], tensor(image))
    new = results.clone()
    new[..., top : top + 64, left : left + 64] = 0
    assert new.max() < 0.01
    inner = prepare_source(image, RULE, padding=padding).image
    x, y = (left if right else generated_size[0] - 64), (top if bottom else generated_size[1] - 64)
    assert torch.equal(inner[..., y : y + 64, x : x + 64], tensor(image))  # at the very place, not resized


@pytest.mark.parametrize("size", [(500, 300), (1200, 900)])
def test_padding_of_any_image(size):
    image, (width, height) = photo(*size), size
    padding = (100, 0, 150, 33)
    source = prepare_source(image, RULE, padding=padding)
    RULE.check(*source.image.shape[-2:])
    results = source.restore(generated(source))
    assert results.shape[-2:] == (height + 33, width + 250)
    assert torch.equal(results[..., :height, 100 : 100 + width], tensor(image))
    assert results[..., height:, :].max() < 0.01 and results[..., :100].max() < 0.01
    known = ~source.mask[0]
    left, top, _, bottom = source.margins
    assert not known[:, :left].any() and not known[len(known) - bottom :].any() and known[top, left + 1]


def test_padding_and_a_mask_together():
    source = prepare_source(photo(64, 64), RULE, mask_image=rectangle(64, 64, (0, 0, 64, 8)), padding=(0, 0, 16, 0))
    expected = torch.zeros(64, 80)
    expected[:8] = expected[:, 64:] = 1
    assert torch.equal(source.blend[0, 0], expected)


def test_padding_and_an_explicit_size():
    source = prepare_source(photo(500, 300), RULE, padding=(100, 0, 100, 0), height=48, width=112)
    assert source.image.shape == (1, 3, 48, 112) == source.restore(source.image).shape
    assert source.margins == (4, 0, 4, 0) and not source.mask[..., 4:24].any() and source.mask[..., :4].all()


def test_padding_and_padding_mask_crop():
    image = photo(500, 300)
    source = prepare_source(image, RULE, padding=(0, 0, 40, 0), padding_mask_crop=20)
    results = source.restore(generated(source))
    assert source.box[0] > 0 and torch.equal(results[..., :500], tensor(image)) and results[..., 500:].max() < 0.01


# ----------------------------------------------------------------------------------------------------------- token grids


def test_token_grids_are_taken_as_they_are():
    tokens = torch.arange(12 * 20).view(12, 20)
    source = prepare_source(tokens, RULE)
    assert source.is_tokens and torch.equal(source.image, tokens[None]) and source.mask is None
    mask = torch.zeros(12, 20)
    mask[2:4] = 1
    with pytest.raises(ValueError, match="padding"):
        prepare_source(tokens, RULE, mask_image=mask, padding=(10**9, 0, 0, 0))
    source = prepare_source(tokens, RULE, mask_image=mask, padding=(16, 0, 0, 32), height=48, width=80)
    assert torch.equal(source.image[:, :12, 4:], tokens[None]) and source.image.shape == (1, 20, 24)
    assert torch.equal(source.mask[0, :12, 4:], mask.bool()) and source.mask[:, 12:].all() and source.mask[..., :4].all()
    images = torch.rand(1, 3, 80, 96)
    assert torch.equal(source.restore(images), images)


# ---------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image": None}, "`image` must be a PIL image.*got NoneType"),
        ({"image": []}, "got an empty list"),
        ({"image": [photo(8, 8), "x"]}, "got Image, str"),
        ({"image": torch.rand(3, 0, 8)}, "got Tensor"),
        ({"image": torch.rand(1, 64, 64)}, "3 channels, red, green and blue, got shape"),
        ({"image": np.array(photo(8, 8))}, "`image` must be in \\[0, 1\\], got .* divide bytes by 255"),
        ({"image": torch.full((3, 64, 64), math.nan)}, "must be in \\[0, 1\\], got nan"),
        ({"mask_image": "mask.png"}, "`mask_image` must be a PIL image, an array or a tensor, got str"),
        ({"mask_image": torch.full((64, 64), 255.0)}, "`mask_image` must be in \\[0, 1\\], got 255"),
        ({"mask_image": torch.zeros(1, 3, 64, 64)}, "`mask_image` must have one channel"),
        ({"mask_image": torch.zeros(64)}, "`mask_image` must be a PIL image"),
        ({"padding": (8, 0, 0)}, "must be \\(left, top, right, bottom\\)"),
        ({"padding": (-16, 0, 0, 0)}, "at least 0"),
        ({"padding": (10**9, 0, 0, 0)}, "`padding` makes the image 1000000064×64, more than"),
        ({"height": 100}, "multiples of 16, got 100 and"),
        ({"height": 0}, "`height` must be a number of pixels, got 0"),
        ({"width": "64"}, "`width` must be a number of pixels, got '64'"),
        ({"resize_mode": "stretch"}, "`resize_mode` must be one of 'default', 'fill', 'crop', got 'stretch'"),
        ({"feather_radius": -1}, "`feather_radius`"),
        ({"keep_original_pixels": "no"}, "`keep_original_pixels` must be True or False, got 'no'"),
        ({"padding_mask_crop": 8}, "`padding_mask_crop` needs `mask_image`"),
        ({"padding_mask_crop": -1}, "`padding_mask_crop` must be an integer of at least 0, got -1"),
        ({"padding_mask_crop": 8, "mask_image": torch.ones(64, 64), "resize_mode": "fill"}, "leave `resize_mode` out"),
        ({"image": [photo(64, 64), photo(8, 8)], "height": 64, "width": 64, "padding": (8, 0, 0, 0)}, "images of one size"),
        (
            {"image": torch.zeros(8, 8, dtype=torch.long), "height": 64},
            "token grid of 32×32 pixels, which cannot be resized",
        ),
        ({"image": torch.zeros(8, 8, dtype=torch.long), "padding": (2, 0, 0, 0)}, "multiples of 4"),
        ({"image": torch.zeros(8, 8, dtype=torch.long), "padding": (4, 0, 0, 0)}, "both must be multiples of 16"),
        ({"image": torch.zeros(0, 8, dtype=torch.long)}, "token grid of 32×0 pixels"),
        ({"image": torch.zeros(8, 8, dtype=torch.long), "mask_image": torch.ones(32, 32)}, "mask of the token grid, 8×8"),
        ({"image": torch.zeros(8, 8, dtype=torch.long), "resize_mode": "fill"}, "need pixels, but `image` is a token grid"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare_source(**{"image": photo(64, 64), "rule": RULE} | arguments)
