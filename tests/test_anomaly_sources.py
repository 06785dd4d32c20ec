# SPDX-License-Identifier: Apache-2.0
import cv2
import numpy as np
import pytest
import torch

from anomalib_cpr import anomaly_sources
from anomalib_cpr.anomaly_sources import (
    PATTERNS,
    ProceduralTextures,
    TextureFolder,
    cellular_distances,
    fractal_noise,
    read_texture,
)

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write(file, colour=(255, 0, 0), size=(40, 60)):
    """An image of one RGB colour."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((*size, 3), colour[::-1], dtype=np.uint8)
    file.write_bytes(cv2.imencode(file.suffix, image)[1].tobytes())


@pytest.fixture
def folder(tmp_path):
    """Five images of different blue, one kind of file and one folder each."""
    for index, suffix in enumerate((".png", ".bmp", ".PNG", ".tif", ".webp")):
        write(tmp_path / f"class {index}" / f"ü{index}{suffix}", (255, 0, 50 * index))
    (tmp_path / "readme.txt").write_text("no image")
    (tmp_path / "._0.png").write_bytes(b"what some systems leave on memory sticks")
    return tmp_path


def test_folder_finds_images_of_all_kinds_recursively(folder):
    assert len(TextureFolder(folder).files) == 5
    assert len(TextureFolder(str(folder)).files) == 5


def test_folder_gives_rgb_in_unit_range(folder):
    textures = TextureFolder(folder).sample(100, (12, 20), seeded(), CPU)
    assert textures.shape == (100, 3, 12, 20)
    assert textures.dtype == torch.float32
    assert textures[:, 0].min() >= 0.98  # red first; webp is lossy
    assert textures[:, 1].max() <= 0.02
    blues = {round(value, 1) for value in textures[:, 2, 0, 0].tolist()}
    assert len(blues) == 5  # every file is drawn


def test_folder_repeats_under_the_generator_whatever_is_in_the_cache(folder):
    fresh, used, forgetful = TextureFolder(folder), TextureFolder(folder), TextureFolder(folder, cache_bytes=0)
    used.sample(7, (9, 9), seeded(5), CPU)
    used.sample(7, (12, 20), seeded(6), CPU)
    expected = fresh.sample(10, (12, 20), seeded(1), CPU)
    assert torch.equal(expected, used.sample(10, (12, 20), seeded(1), CPU))
    assert torch.equal(expected, forgetful.sample(10, (12, 20), seeded(1), CPU))


def test_folder_cache_is_bounded_and_drops_the_oldest(folder):
    texture_bytes = 3 * 8 * 8
    source = TextureFolder(folder, cache_bytes=2 * texture_bytes + 1)
    source.sample(50, (8, 8), seeded(), CPU)
    assert len(source._cache) == 2
    assert source._held_bytes == 2 * texture_bytes


def test_folder_decodes_a_cached_texture_once(folder, monkeypatch):
    read = []
    monkeypatch.setattr(
        anomaly_sources, "read_texture", lambda file, size: read.append(file) or read_texture(file, size)
    )
    source = TextureFolder(folder)
    source.sample(50, (8, 8), seeded(), CPU)
    assert len(read) == 5


def test_folder_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*None for the built-in"):
        TextureFolder(tmp_path / "nowhere")


def test_folder_is_a_file(tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match=r"a\.png does not exist or is not a folder"):
        TextureFolder(tmp_path / "a.png")


def test_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match=f"{tmp_path.name} holds no images"):
        TextureFolder(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_broken_texture_is_named(tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    source = TextureFolder(tmp_path)
    with pytest.raises(OSError, match=r"broken\.png cannot be read"):
        source.sample(1, (8, 8), seeded(), CPU)


def test_texture_deleted_after_listing_is_named(tmp_path):
    write(tmp_path / "gone.png")
    source = TextureFolder(tmp_path)
    (tmp_path / "gone.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        source.sample(1, (8, 8), seeded(), CPU)


@pytest.mark.parametrize("channels", ["grey", "alpha", "16 bit"])
def test_other_pixel_formats_become_rgb(tmp_path, channels):
    image = {
        "grey": np.full((5, 5), 128, np.uint8),
        "alpha": np.full((5, 5, 4), 128, np.uint8),
        "16 bit": np.full((5, 5, 3), 128 * 257, np.uint16),
    }[channels]
    file = tmp_path / "a.png"
    file.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    texture = read_texture(file, (4, 6))
    assert texture.shape == (3, 4, 6)
    assert (texture == 128).all()


@pytest.mark.parametrize("size", [(1, 1), (8, 200), (72, 104), (33, 17), (64, 64)])
def test_procedural_textures_of_any_size(size):
    textures = ProceduralTextures().sample(16, size, seeded(), CPU)
    assert textures.shape == (16, 3, *size)
    assert textures.isfinite().all()
    assert textures.min() >= 0
    assert textures.max() <= 1


def test_no_textures(folder):
    for source in (ProceduralTextures(), TextureFolder(folder)):
        assert source.sample(0, (8, 9), seeded(), CPU).shape == (0, 3, 8, 9)


def test_procedural_textures_repeat_under_the_generator_alone():
    source = ProceduralTextures()
    first = source.sample(8, (40, 40), seeded(1), CPU)
    source.sample(3, (40, 40), seeded(2), CPU)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(first, source.sample(8, (40, 40), seeded(1), CPU))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, source.sample(8, (40, 40), seeded(2), CPU))


def test_procedural_textures_vary():
    textures = ProceduralTextures().sample(64, (64, 64), seeded(), CPU)
    # Hardly one of them is blank, and they differ in colour and in contrast.
    contrast = textures.std((2, 3)).mean(1)
    assert (contrast > 0.03).float().mean() > 0.95
    assert contrast.std() > 0.03
    assert textures.mean((2, 3)).std(0).min() > 0.1


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: pattern.__name__)
def test_every_pattern_has_both_colours(pattern):
    v, u = torch.meshgrid(*2 * [torch.arange(64) / 8], indexing="ij")
    noise = fractal_noise((64, 64), torch.ones(1, 1, 1, 1), seeded(), CPU)[:, 0]
    drawn = pattern(u[None], v[None], noise, seeded())
    assert drawn.shape == (1, 64, 64)
    assert 0.02 < (drawn > 0).float().mean() < 0.98


def test_cellular_distances_equal_a_search_over_all_points():
    u, v = 8 * torch.rand((2, 1, 20, 20), generator=seeded(1)) + 2
    first, second, value = cellular_distances(u, v, seeded(2))
    offset_u, offset_v, values = torch.rand((3, 1, 64 * 64), generator=seeded(2)).view(3, 64, 64)
    row, column = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    points = torch.stack([column + offset_u, row + offset_v], dim=-1).view(-1, 2)
    distances = torch.cdist(
        torch.stack([u, v], dim=-1).view(-1, 2), points, compute_mode="donot_use_mm_for_euclid_dist"
    )
    nearest = distances.topk(2, largest=False)
    torch.testing.assert_close(first.flatten(), nearest.values[:, 0])
    assert torch.equal(value.flatten(), values.flatten()[nearest.indices[:, 0]])
    # The second nearest may, rarely, lie beyond the eight neighbouring cells.
    close = (second.flatten() - nearest.values[:, 1]).abs() < 1e-5
    assert close.float().mean() > 0.98


def test_fractal_noise_is_normalised_and_smoother_with_more_slope():
    noise = fractal_noise((64, 96), torch.tensor([0.0, 1.5]).view(2, 1, 1, 1), seeded(), CPU)
    torch.testing.assert_close(noise.mean((1, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(noise.square().mean((1, 2, 3)), torch.ones(2))
    roughness = noise.diff(dim=-1).abs().mean((1, 2, 3))
    assert roughness[0] > 3 * roughness[1]
