# SPDX-License-Identifier: Apache-2.0
"""Augmentation of the training pairs: salt-and-pepper noise and a change of lightness, drawn per image.

Source: CPR (arXiv 2308.06748), section IV, with the values of the authors' code.
"""

import torch
from torch import Tensor

NOISE_PROBABILITY = 0.3
LEAST_SIGNAL_SHARE = 0.97
LIGHTNESS_PROBABILITY = 0.3
LIGHTNESS_CHANGE = 0.1


def device_generator(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """Random generator for numbers that are needed on a device.

    Args:
        generator (torch.Generator): On the CPU.
        device (torch.device): Where the numbers are needed.

    Returns:
        torch.Generator: The given one for the CPU, which stays untouched; otherwise a new one on the device, seeded
            by a number drawn from the given one.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return generator
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


def hand_over(choices: Tensor, device: torch.device) -> Tensor:
    """Bring choices made on the CPU to a device, without waiting until it has done all that came before.

    Args:
        choices (Tensor): On the CPU.
        device (torch.device): Where they are needed.

    Returns:
        Tensor: On the device.
    """
    return choices.to(device, non_blocking=True)


def salt_and_pepper(images: Tensor, signal_share: Tensor, generator: torch.Generator) -> Tensor:
    """Turn a random share of the pixels black or white, all channels of a pixel together.

    Args:
        images (Tensor): Colours in 0..1, ``(batch, channels, height, width)``.
        signal_share (Tensor): Share of pixels that stay, 0..1, ``(batch,)``; half of the others becomes black, half
            white.
        generator (torch.Generator): On the device of the images.

    Returns:
        Tensor: Same shape; the input is not changed.
    """
    batch, _, height, width = images.shape
    chance = torch.rand((batch, 1, height, width), generator=generator, device=images.device)
    half = ((1 - signal_share) / 2).to(chance).view(-1, 1, 1, 1)
    return images.masked_fill(chance < half, 0).masked_fill_(chance >= 1 - half, 1)


def change_lightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply the lightness of the HLS colour space; hue and saturation stay.

    In HLS a colour is ``L + S * min(L, 1 - L) * direction``, where the direction depends on the hue alone. So a new
    lightness moves the grey point and scales the distance to it, and no colour space needs to be visited.

    Args:
        images (Tensor): RGB in 0..1, ``(batch, 3, height, width)``.
        factor (Tensor): Non-negative factor on the lightness, ``(batch,)``; the product is clamped to 1.

    Returns:
        Tensor: Same shape, in 0..1.
    """
    lowest, highest = images.aminmax(dim=1, keepdim=True)
    lightness = (lowest + highest) / 2
    changed = (lightness * factor.to(images).view(-1, 1, 1, 1)).clamp(0, 1)
    room = torch.minimum(lightness, 1 - lightness)
    # Black and white have no room, hence no colour that could be scaled.
    scale = torch.minimum(changed, 1 - changed) / room.clamp_min(torch.finfo(images.dtype).tiny)
    return torch.addcmul(changed, images - lightness, scale).clamp_(0, 1)


@torch.no_grad()
def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Augment each image on its own: salt and pepper with p 0.3, lightness up to ±10 % with p 0.3.

    Args:
        images (Tensor): RGB in 0..1, ``(batch, 3, height, width)``.
        generator (torch.Generator): On the CPU; every choice comes from it.

    Returns:
        Tensor: Same shape. Images for which nothing is drawn come out bit by bit as they came in.
    """
    batch, device = len(images), images.device
    noisy, lighter, share, change = torch.rand((4, batch), generator=generator)
    images = images.clone()
    # The choices are made on the CPU, so that a GPU need not be asked which images they fell on.
    chosen = (noisy < NOISE_PROBABILITY).nonzero().flatten()
    if len(chosen):
        signal_share = LEAST_SIGNAL_SHARE + (1 - LEAST_SIGNAL_SHARE) * share[chosen]
        where = hand_over(chosen, device)
        noise = device_generator(generator, device)
        images[where] = salt_and_pepper(images[where], hand_over(signal_share, device), noise)
    chosen = (lighter < LIGHTNESS_PROBABILITY).nonzero().flatten()
    if len(chosen):
        factor = 1 + LIGHTNESS_CHANGE * (2 * change[chosen] - 1)
        where = hand_over(chosen, device)
        images[where] = change_lightness(images[where], hand_over(factor, device))
    return images
