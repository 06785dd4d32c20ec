# SPDX-License-Identifier: Apache-2.0
import colorsys

import pytest
import torch

from anomalib_cpr.augmentation import augment, change_lightness, device_generator, salt_and_pepper


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lightness_reference(colour, factor):
    hue, lightness, saturation = colorsys.rgb_to_hls(*colour)
    return colorsys.hls_to_rgb(hue, min(1.0, lightness * factor), saturation)


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.9, 1.0, 1.1, 2.0])
def test_lightness_equals_that_of_the_standard_library(factor):
    colours = torch.cat(
        [
            torch.rand((200, 3), generator=seeded()).double(),
            torch.cartesian_prod(
                *3 * [torch.tensor([0.0, 0.25, 0.5, 1.0]).double()]
            ),  # greys, black, white, pure colours
        ]
    )
    changed = change_lightness(colours.T[None, :, :, None], torch.tensor([factor]))[0, :, :, 0].T
    expected = torch.tensor([lightness_reference(colour, factor) for colour in colours.tolist()]).double()
    # colorsys itself takes a few roundings of double precision. Factors are made float32 by torch.tensor.
    torch.testing.assert_close(changed, expected, atol=2e-7, rtol=0)


def test_lightness_is_per_image_and_stays_in_range():
    images = torch.rand((2, 3, 5, 7), generator=seeded())
    changed = change_lightness(images, torch.tensor([1.0, 1.1]))
    torch.testing.assert_close(changed[0], images[0], atol=1e-6, rtol=0)
    assert changed[1].mean() > images[1].mean()
    assert changed.min() >= 0
    assert changed.max() <= 1


@pytest.mark.parametrize(("share", "tolerance"), [(1.0, 0.0), (0.97, 0.003), (0.5, 0.01), (0.0, 0.0)])
def test_salt_and_pepper_changes_the_stated_share(share, tolerance):
    images = torch.full((1, 3, 200, 200), 0.4)
    noisy = salt_and_pepper(images, torch.tensor([share]), seeded())
    assert (noisy == 0.4).float().mean().item() == pytest.approx(share, abs=tolerance)
    assert (noisy == 0).float().mean().item() == pytest.approx((1 - share) / 2, abs=0.01)
    assert ((noisy == 0) | (noisy == 1) | (noisy == images)).all()
    assert (noisy == noisy[:, :1]).all()  # the same pixel in all channels
    assert (images == 0.4).all()


def test_salt_and_pepper_takes_a_share_per_image():
    noisy = salt_and_pepper(torch.full((2, 3, 50, 50), 0.4), torch.tensor([1.0, 0.5]), seeded())
    assert (noisy[0] == 0.4).all()
    assert not (noisy[1] == 0.4).all()


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3, 72, 104), (5, 3, 33, 17), (0, 3, 8, 8)])
def test_augment_keeps_shape_range_and_input(shape):
    images = torch.rand(shape, generator=seeded())
    before = images.clone()
    augmented = augment(images, seeded(1))
    assert augmented.shape == images.shape
    assert ((augmented >= 0) & (augmented <= 1)).all()
    assert torch.equal(images, before)


def test_augment_repeats_under_the_generator_alone():
    images = torch.rand((8, 3, 16, 16), generator=seeded())
    first = augment(images, seeded(3))
    torch.manual_seed(99)
    assert torch.equal(first, augment(images, seeded(3)))
    assert not torch.equal(first, augment(images, seeded(4)))


def test_augment_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    augment(torch.rand((8, 3, 16, 16), generator=seeded()), seeded())
    assert torch.equal(torch.get_rng_state(), state)


def test_augment_draws_each_change_with_probability_three_tenths():
    # Grey 0.4: salt and pepper makes 0 or 1, lightness shifts the rest within ±10 %.
    augmented = augment(torch.full((4000, 3, 8, 8), 0.4), seeded()).flatten(1)
    middle = augmented.median(dim=1).values  # at most 3 % of the pixels are noise
    lighter = (middle - 0.4).abs() > 1e-6
    assert lighter.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert middle.min() >= 0.36 - 1e-6
    assert middle.max() <= 0.44 + 1e-6
    assert middle.min() < 0.365
    assert middle.max() > 0.435
    noise = (augmented != middle[:, None]).float().mean()
    assert noise.item() == pytest.approx(0.3 * 0.015, abs=0.001)
    # Of the images without change of lightness, 7 of 10 are what they were.
    untouched = (augmented == 0.4).all(1).float().mean().item()
    assert untouched > 0.7 * 0.7 - 0.03


def test_generator_of_the_cpu_is_the_given_one():
    generator = seeded(1)
    state = generator.get_state()
    assert device_generator(generator, torch.device("cpu")) is generator
    assert torch.equal(generator.get_state(), state)


@pytest.mark.gpu
def test_generator_of_a_gpu_follows_the_given_one():
    device = torch.device("cuda")
    first, second, third = (device_generator(seeded(seed), device).initial_seed() for seed in (1, 1, 2))
    assert first == second != third
    images = torch.rand((8, 3, 32, 32), generator=seeded()).to(device)
    assert torch.equal(augment(images, seeded(3)), augment(images, seeded(3)))
