# SPDX-License-Identifier: Apache-2.0
import colorsys

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from anomalib_cpr import appearance
from anomalib_cpr.appearance import (
    OPERATIONS,
    PHOTOMETRIC_OPERATIONS,
    change_appearance,
    change_hue_and_saturation,
    recolour,
    rotate,
)

EACH_OPERATION = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(count=4, size=(64, 64), seed=0):
    return torch.rand((count, 3, *size), generator=seeded(seed))


def operation_called(name):
    return next(operation for operation in OPERATIONS if operation.__name__ == name)


def test_rotate_by_quarter_turns():
    images = torch.rand((3, 2, 6, 6), generator=seeded())
    turned = rotate(images, torch.tensor([0.0, 90.0, -90.0]), (6, 6))
    torch.testing.assert_close(turned[0], images[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(turned[1], images[1].rot90(1, (1, 2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(turned[2], images[2].rot90(-1, (1, 2)), atol=1e-5, rtol=0)


def test_rotate_cuts_out_the_middle():
    images = torch.rand((1, 1, 8, 8), generator=seeded())
    torch.testing.assert_close(rotate(images, torch.zeros(1), (4, 8)), images[..., 2:6, :], atol=1e-5, rtol=0)
    torch.testing.assert_close(rotate(images, torch.zeros(1), (8, 2)), images[..., 3:5], atol=1e-5, rtol=0)


def test_rotate_leaves_corners_empty():
    turned = rotate(torch.ones(1, 1, 32, 32), torch.tensor([45.0]), (32, 32))
    assert turned[0, 0, 0, 0] == 0
    assert turned[0, 0, 16, 16].item() == pytest.approx(1)


@pytest.mark.parametrize("size", [(24, 24), (18, 31), (40, 9)])
def test_rotate_equals_torchvision(size):
    images, degrees = some_images(5, size), torch.tensor([-45.0, -7.0, 0.0, 20.0, 44.0])
    expected = [
        v2.functional.rotate(image, angle, v2.InterpolationMode.BILINEAR)
        for image, angle in zip(images, degrees.tolist(), strict=True)
    ]
    torch.testing.assert_close(rotate(images, degrees, size), torch.stack(expected), atol=1e-4, rtol=0)


@EACH_OPERATION
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_operations_accept_any_image(operation, strength):
    for images in (
        some_images(2, (17, 23)),
        torch.zeros(1, 3, 17, 23),
        torch.ones(1, 3, 17, 23),
        some_images(3, (1, 1)),
    ):
        changed = operation(images, torch.full((len(images), 3), strength)).clamp(0, 1)
        assert changed.shape == images.shape
        assert changed.isfinite().all()


@EACH_OPERATION
def test_operations_do_something(operation):
    # Compressed contrast, so that stretching it shows.
    images = 0.2 + 0.6 * some_images(1, (32, 32))
    assert (operation(images, torch.tensor([[0.2, 0.8, 0.6]])).clamp(0, 1) - images).abs().max() > 0.01


@EACH_OPERATION
def test_each_image_is_changed_by_its_own_strength(operation):
    images, strengths = some_images(6, (20, 28)), torch.rand((6, 3), generator=seeded(1))
    strengths[4], strengths[5] = 0, 1
    alone = [operation(images[i : i + 1], strengths[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(operation(images, strengths), torch.cat(alone), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_sharpness", lambda image, strength: v2.functional.adjust_sharpness(image, 3 * strength[0])),
        ("_solarise", lambda image, strength: v2.functional.solarize(image, (32 + 96 * strength[0]) / 255)),
        ("_posterise", lambda image, strength: v2.functional.posterize(image, 1 + int(5 * strength[0]))),
    ],
)
@pytest.mark.parametrize("strength", [0.0, 0.19, 0.2, 0.5, 0.99, 1.0])
def test_operations_equal_those_of_torchvision(name, expected, strength):
    images, strengths = some_images(1, (21, 34)), torch.tensor([[strength, 0.5, 0.5]])
    changed = operation_called(name)(images, strengths).clamp(0, 1)
    torch.testing.assert_close(changed[0], expected(images[0], strengths[0].tolist()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("saturation", [-1.0, -0.2, 0.0, 0.2, 1.0])
@pytest.mark.parametrize("hue", [-0.5, -0.1, 0.0, 0.3, 0.5])
def test_hue_and_saturation_equal_those_of_the_standard_library(hue, saturation):
    corners = torch.cartesian_prod(*3 * [torch.tensor([0.0, 0.25, 1.0]).double()])  # greys, black, white, pure colours
    colours = torch.cat([torch.rand((200, 3), generator=seeded()).double(), corners])
    images = colours.T[None, :, :, None].expand(2, -1, -1, -1)
    changes = torch.tensor([[0.0, 0.0], [hue, saturation]]).double()
    untouched, changed = change_hue_and_saturation(images, *changes.T)[..., 0].mT
    expected = []
    for colour in colours.tolist():
        h, s, v = colorsys.rgb_to_hsv(*colour)
        expected.append(
            colorsys.hsv_to_rgb((h + changes[1, 0].item()) % 1, min(1.0, max(0.0, s + changes[1, 1].item())), v)
        )
    torch.testing.assert_close(changed, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(untouched, colours, atol=1e-9, rtol=0)


def test_grey_images_get_a_tint():
    changed = operation_called("_hue_and_saturation")(torch.full((1, 3, 4, 4), 0.5), torch.tensor([[1.0, 1.0, 0.5]]))
    assert changed.amax(1).sub(changed.amin(1)).min() > 0.05


def test_there_are_ten_operations_of_which_an_image_gets_three():
    assert len(OPERATIONS) == 10
    assert len(PHOTOMETRIC_OPERATIONS) == 9
    calls = []

    def recorder(number):
        def record(images, strength):
            mark = images[:, 0, 0, 0]
            calls.extend(
                (int(image), number, tuple(values)) for image, values in zip(mark, strength.tolist(), strict=True)
            )
            return images

        return record

    images = torch.arange(200.0).view(200, 1, 1, 1).expand(-1, 3, 4, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(appearance, "OPERATIONS", tuple(recorder(number) for number in range(10)))
        patch.setattr(torch.Tensor, "clamp", lambda images, *_: images)
        changed = change_appearance(images, seeded())
    assert torch.equal(changed, images)  # each came back to its place
    of_image = [[number for image, number, _ in calls if image == wanted] for wanted in range(200)]
    assert all(len(numbers) == len(set(numbers)) == 3 for numbers in of_image)
    assert np.bincount(np.ravel(of_image), minlength=10).min() > 30  # 60 expected of each
    assert len({strength for *_, strength in calls}) == 600


def test_operations_follow_one_another_as_drawn():
    images = some_images(12, (16, 16))
    changed = change_appearance(images, seeded(3))
    draws = seeded(3)
    chosen = torch.rand((12, 10), generator=draws).argsort(1)[:, :3]
    strengths = torch.rand((12, 3, 3), generator=draws)
    for index in range(12):
        image = images[index : index + 1]
        for turn in range(3):
            image = OPERATIONS[chosen[index, turn]](image, strengths[index, turn][None]).clamp(0, 1)
        torch.testing.assert_close(changed[index], image[0], atol=1e-6, rtol=0)


def test_recolouring_keeps_what_has_one_colour_of_one_colour():
    """It sees colours alone, not where they are: a map from colours to colours, another one for each image."""
    colours = torch.tensor([[0.1, 0.7, 0.3], [0.9, 0.2, 0.5], [0.4, 0.4, 0.4], [0.0, 0.0, 0.0]])
    where = torch.randint(4, (40, 40), generator=seeded(2))
    images = colours[where].permute(2, 0, 1).expand(6, -1, -1, -1)
    changed = recolour(images, seeded())
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1
    for image in changed:
        for colour in range(4):
            of_one = image[:, where == colour]
            torch.testing.assert_close(of_one, of_one[:, :1].expand_as(of_one), atol=1e-6, rtol=0)
    assert (changed - images)[:, :, where < 3].abs().amax((1, 2)).min() > 0.01
    assert len({tuple(image[:, 0, 0].tolist()) for image in changed}) == 6
    assert torch.equal(changed, recolour(images, seeded()))
