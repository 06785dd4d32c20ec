# SPDX-License-Identifier: Apache-2.0
"""Pictures of a toy factory: good and defective parts, drawn by formula.

A part is a signed distance to its outline (negative inside), which gives smooth edges, and a height above the table,
which gives shading. A defect changes the outline, the height or the colour. Every defective part is rendered twice
from the same random numbers, with and without its defect; the mask is where the two renders differ visibly.

All lengths are in units of 1/256 of the image's side, so that a part looks the same at every image size.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

VERSION = 1  # of the drawings; raise it whenever a picture changes
UNITS = 256.0  # lengths of one image side
MIN_SIZE = 64  # below, threads and scratches are thinner than a pixel

GOOD = "good"
DEFECTS: dict[str, tuple[str, ...]] = {
    "bracket": ("dent", "missing_hole", "scratch", "stain"),
    "gear": ("broken_tooth", "contamination", "crack", "scratch"),
    "fabric": ("cut", "missing_thread", "stain", "wrong_colour"),
    "pills": ("chipped", "crack", "speck", "wrong_colour"),
}
DEFECTS["loose_brackets"], DEFECTS["loose_gears"] = DEFECTS["bracket"], DEFECTS["gear"]

VISIBLE = 0.04  # smallest change of a colour channel, of 1, that belongs to a mask; above the sensor's noise
MIN_AREA = 60 / UNITS**2  # smallest defect, as share of the image, of parts that fill it
TRIES = 30

Field = NDArray[np.floating]


class Drawing(NamedTuple):
    """A drawn part.

    Attributes:
        image (NDArray[np.uint8]): RGB, ``(size, size, 3)``.
        mask (NDArray[np.uint8]): 255 where the defect is, else 0, ``(size, size)``.
        clean (NDArray[np.uint8]): The same part in the same light without the defect. Outside of the
            mask it differs from ``image`` by less than :data:`VISIBLE`.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    clean: NDArray[np.uint8]


class Ground(NamedTuple):
    """What a part is laid on, in place of a table of its own.

    Attributes:
        scene (Field): Colours, ``(size, size, 3)``.
        light (NDArray): Direction of the lamp.
    """

    scene: Field
    light: NDArray


class Canvas(NamedTuple):
    """Where the pixels are.

    Attributes:
        x (Field): Units to the right of each pixel's centre, ``(size, size)``.
        y (Field): Units down, ``(size, size)``.
        pixel (float): Units along a pixel's side.
    """

    x: Field
    y: Field
    pixel: float


def draw(
    category: str, defect: str = GOOD, index: int = 0, *, split: str = "test", size: int = 256, seed: int = 0
) -> Drawing:
    """Draw one part.

    The result depends on the arguments only, not on what was drawn before.

    Args:
        category (str): One of :data:`DEFECTS`.
        defect (str): One of the category's defects, or ``"good"``. Defaults to ``"good"``.
        index (int): Number of the part, not negative. Defaults to ``0``.
        split (str): ``"train"`` and ``"test"`` show different parts. Defaults to ``"test"``.
        size (int): Height and width in pixels, at least 64. Defaults to ``256``.
        seed (int): Not negative. Defaults to ``0``.

    Returns:
        Drawing: Image, mask and clean image.

    Raises:
        ValueError: If there is no such category or defect, if a number is too small, or if a defect stays invisible.

    Example:
        >>> from anomalib_cpr.drawing import draw
        >>> part = draw("gear", "crack", size=128)
        >>> part.image.shape, part.mask.shape, bool(part.mask.any())
        ((128, 128, 3), (128, 128), True)
    """
    check(category, size=size, seed=seed)
    if defect not in {GOOD, *DEFECTS[category]}:
        msg = f"Invalid defect={defect!r} of {category!r}; expected one of {', '.join((GOOD, *DEFECTS[category]))}."
        raise ValueError(msg)
    if index < 0:
        raise ValueError(f"Invalid index={index}; expected 0 or more.")

    canvas = _canvas(size)
    key = zlib.crc32(f"{category}/{split}/{defect}".encode())

    def random(*stream: int) -> Generator:
        return np.random.default_rng([seed, key, index, *stream])

    def render(flaw: str, attempt: int) -> Field:
        # The flaw has random numbers of its own, so that the part stays the same whatever the flaw consumes.
        scene = _PAINTERS[category](canvas, random(0), flaw, random(1, attempt))
        return _illuminate(scene, canvas, random(2))

    clean = render(GOOD, 0)
    exposed = _expose(clean, random(3))
    if defect == GOOD:
        return Drawing(exposed, np.zeros((size, size), np.uint8), exposed)
    for attempt in range(TRIES):
        flawed = render(defect, attempt)
        mask = _difference(flawed, clean, canvas)
        if np.count_nonzero(mask) >= least_area(category) * size**2:
            return Drawing(_expose(_mix(clean, flawed, _feather(mask, canvas)), random(3)), mask, exposed)
        # The light hides this one, or it lies outside of the image.
    msg = f"{category}/{defect} {index} cannot be seen at size={size}; use a larger size or another seed than {seed}."
    raise ValueError(msg)


def least_area(category: str) -> float:
    """Smallest defect that is drawn, as share of the image.

    Args:
        category (str): One of :data:`DEFECTS`.

    Returns:
        float: In 0..1.
    """
    return MIN_AREA * (_SCATTERED[category].scale ** 2 if category in _SCATTERED else 1)


def check(category: str, *, size: int, seed: int) -> None:
    """Check what the user chooses.

    Args:
        category (str): One of :data:`DEFECTS`.
        size (int): Height and width in pixels.
        seed (int): Seed.

    Raises:
        ValueError: If there is no such category, or a number is too small.
    """
    if category not in DEFECTS:
        raise ValueError(f"Invalid category={category!r}; expected one of {', '.join(DEFECTS)}.")
    if size < MIN_SIZE:
        raise ValueError(f"Invalid image_size={size}; parts are drawn with {MIN_SIZE} pixels or more.")
    if seed < 0:
        raise ValueError(f"Invalid seed={seed} of the drawing; expected 0 or more.")


# --- Camera ---------------------------------------------------------------------------------------------------------


def _canvas(size: int) -> Canvas:
    pixel = UNITS / size
    axis = ((np.arange(size) + 0.5) * pixel).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return Canvas(x, y, pixel)


def _illuminate(scene: Field, canvas: Canvas, rng: Generator) -> Field:
    """Let the lamp's brightness, colour and place vary, and the lens blur a little."""
    slope = rng.normal(0, 0.035, 2)
    lamp = 1 + slope[0] * (canvas.x / 128 - 1) + slope[1] * (canvas.y / 128 - 1)
    vignette = 1 - 0.08 * ((canvas.x / 128 - 1) ** 2 + (canvas.y / 128 - 1) ** 2)
    tint = rng.normal(1, 0.045) * rng.normal(1, 0.012, 3)
    light = (lamp * vignette)[..., None] * tint
    return cv2.GaussianBlur((scene * light).astype(np.float32), (0, 0), 0.55 / canvas.pixel + 0.1)


def _expose(scene: Field, rng: Generator) -> NDArray[np.uint8]:
    """Add the sensor's noise and round."""
    grey, colour = rng.standard_normal(scene.shape[:2]), rng.standard_normal(scene.shape)
    deviation = 0.006 + 0.008 * np.sqrt(scene.clip(0, 1))
    noisy = scene + deviation * (0.8 * grey[..., None] + 0.5 * colour)
    return np.rint(255 * noisy).clip(0, 255).astype(np.uint8)


def _difference(flawed: Field, clean: Field, canvas: Canvas) -> NDArray[np.uint8]:
    """Mask of what changed visibly, without pinholes and single pixels."""
    changed = np.abs(flawed.clip(0, 1) - clean.clip(0, 1)).max(axis=2) > VISIBLE
    side = 2 * round(1.5 / canvas.pixel) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    closed = cv2.morphologyEx(changed.astype(np.uint8), cv2.MORPH_CLOSE, kernel)
    contours, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    kept = [contour for contour in contours if len(contour) > 3]
    return cv2.drawContours(np.zeros_like(closed), kept, -1, 255, cv2.FILLED).astype(np.uint8)


def _feather(mask: NDArray[np.uint8], canvas: Canvas) -> Field:
    """1 on the mask, fading to 0 around it: changes too faint for the mask end without a seam."""
    inside = (mask > 0).astype(np.float32)
    return np.maximum(inside, (2 * cv2.GaussianBlur(inside, (0, 0), 2 / canvas.pixel)).clip(0, 1))


# --- Shapes ---------------------------------------------------------------------------------------------------------


def _cover(distance: Field, canvas: Canvas) -> Field:
    """Share of each pixel inside of an outline: what makes edges smooth."""
    return np.clip(0.5 - distance / canvas.pixel, 0, 1).astype(np.float32)


def _circle(x: Field, y: Field, centre: tuple[float, float], radius: float) -> Field:
    return np.hypot(x - centre[0], y - centre[1]) - radius


def _box(x: Field, y: Field, half: tuple[float, float], corner: float) -> Field:
    """A rectangle around the origin with round corners."""
    dx, dy = np.abs(x) - half[0] + corner, np.abs(y) - half[1] + corner
    return np.hypot(dx.clip(0), dy.clip(0)) + np.minimum(np.maximum(dx, dy), 0) - corner


def _line(x: Field, y: Field, points: NDArray) -> tuple[Field, Field]:
    """Distance to a line through points ``(n, 2)``, and how far along it, from 0 to 1, the nearest point lies."""
    distance, along = np.full_like(x, np.inf), np.zeros_like(x)
    for number, (start, end) in enumerate(pairwise(points)):
        dx, dy = end - start
        part = (((x - start[0]) * dx + (y - start[1]) * dy) / max(dx * dx + dy * dy, 1e-6)).clip(0, 1)
        here = np.hypot(x - start[0] - part * dx, y - start[1] - part * dy)
        nearer = here < distance
        distance = np.where(nearer, here, distance)
        along = np.where(nearer, (number + part) / (len(points) - 1), along)
    return distance, along


def _turn(x: Field, y: Field, centre: NDArray, angle: float) -> tuple[Field, Field]:
    """Coordinates of a part whose centre and angle (radians) are given."""
    cosine, sine = np.cos(angle), np.sin(angle)
    dx, dy = x - centre[0], y - centre[1]
    return (cosine * dx + sine * dy).astype(np.float32), (cosine * dy - sine * dx).astype(np.float32)


def _smooth(value: Field) -> Field:
    """From 0 to 1 without a kink at either end."""
    value = np.clip(value, 0, 1)
    return value * value * (3 - 2 * value)


# --- Randomness -----------------------------------------------------------------------------------------------------


def _noise(x: Field, y: Field, rng: Generator, grain: float | tuple[float, float]) -> Field:
    """Smooth noise of unit deviation whose grains have this size (width, height); it repeats after 512 units."""
    width, height = (grain, grain) if isinstance(grain, int | float) else grain
    cells = rng.standard_normal((max(4, round(512 / height)), max(4, round(512 / width)))).astype(np.float32)
    rows, columns = cells.shape
    sampled = cv2.remap(
        cells,
        (x * np.float32(columns / 512)) % columns,
        (y * np.float32(rows / 512)) % rows,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_WRAP,
    )
    return sampled * np.float32(1.5)  # interpolation takes a third of the deviation


def _pick(rng: Generator, canvas: Canvas, allowed: NDArray[np.bool_]) -> NDArray:
    """A random place, ``(x, y)``, among the allowed pixels."""
    places = np.flatnonzero(allowed)
    place = places[int(rng.random() * len(places))] if len(places) else allowed.size // 2
    return np.array([canvas.x.flat[place], canvas.y.flat[place]])


def _stroke(rng: Generator, centre: NDArray, length: float, bend: float, count: int = 9) -> NDArray:
    """Points ``(count, 2)`` of a bent line."""
    angle = rng.uniform(0, 2 * np.pi)
    along = np.linspace(-0.5, 0.5, count)
    across = bend * (0.25 - along**2) * rng.choice([-1, 1])
    direction = np.array([np.cos(angle), np.sin(angle)])
    normal = np.array([-direction[1], direction[0]])
    return centre + length * (along[:, None] * direction + across[:, None] * normal)


def _zigzag(rng: Generator, start: NDArray, angle: float, length: float, count: int = 8) -> NDArray:
    """Points ``(count + 1, 2)`` of a crack."""
    steps = length / count * rng.uniform(0.6, 1.4, count)
    angles = angle + np.cumsum(rng.normal(0, 0.25, count)) + rng.choice([-1, 1], count) * rng.uniform(0.2, 0.7, count)
    path = np.cumsum(steps[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1), axis=0)
    return np.concatenate([start[None], start + path])


def _blob(canvas: Canvas, rng: Generator, centre: NDArray, radius: float) -> Field:
    """Distance to an uneven round outline."""
    x, y = _turn(canvas.x, canvas.y, centre, rng.uniform(0, np.pi))
    ragged = _noise(canvas.x, canvas.y, rng, 0.9 * radius) + 0.4 * _noise(canvas.x, canvas.y, rng, 0.35 * radius)
    return np.hypot(x, y * rng.uniform(1, 1.6)) - radius + 0.14 * radius * ragged


# --- Surfaces -------------------------------------------------------------------------------------------------------


def _mix(below: Field, above: Field | NDArray, cover: Field) -> Field:
    return (below + cover[..., None] * (above - below)).astype(np.float32)


def _light(rng: Generator) -> NDArray:
    """Direction of the lamp: from the upper left, not always exactly."""
    azimuth = -2.3 + rng.normal(0, 0.12)
    return np.array([0.55 * np.cos(azimuth), 0.55 * np.sin(azimuth), 0.8])


def _shade(albedo: Field, height: Field, light: NDArray, canvas: Canvas, *, gloss: float, shine: float) -> Field:
    """Colour of a surface under the lamp; a flat matt one keeps its own."""
    slope_y, slope_x = np.gradient(height, canvas.pixel)
    norm = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    diffuse = (light[2] - slope_x * light[0] - slope_y * light[1]).clip(0) * norm / light[2]
    half = light / np.linalg.norm(light) + np.array([0, 0, 1])
    half = half / np.linalg.norm(half)
    specular = ((half[2] - slope_x * half[0] - slope_y * half[1]).clip(0) * norm) ** shine - half[2] ** shine
    return (albedo * (0.4 + 0.6 * diffuse)[..., None] + gloss * specular[..., None]).astype(np.float32)


def _shadow(scene: Field, cover: Field, light: NDArray, canvas: Canvas, length: float) -> Field:
    """Darken the table where the part is between it and the lamp."""
    shift = -light[:2] * length / canvas.pixel
    moved = cv2.warpAffine(
        cover, np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32), cover.shape[::-1], flags=cv2.INTER_LINEAR
    )
    return scene * (1 - 0.5 * cv2.GaussianBlur(moved, (0, 0), 0.35 * length / canvas.pixel))[..., None]


def _scratch(albedo: Field, canvas: Canvas, rng: Generator, allowed: NDArray[np.bool_]) -> Field:
    """Lighten or darken a thin bent line that fades at its ends."""
    points = _stroke(rng, _pick(rng, canvas, allowed), rng.uniform(30, 75), rng.uniform(0, 0.6))
    distance, along = _line(canvas.x, canvas.y, points)
    width = max(rng.uniform(0.7, 1.3), 0.6 * canvas.pixel)
    strength = rng.choice([-1, 1]) * rng.uniform(0.22, 0.38)
    fade = _smooth(4 * along) * _smooth(4 * (1 - along))
    return albedo + (strength * fade * _cover(distance - width, canvas) * allowed)[..., None]


def _crack(albedo: Field, canvas: Canvas, points: NDArray, rng: Generator, inside: Field) -> Field:
    """Darken a jagged line that becomes thinner."""
    distance, along = _line(canvas.x, canvas.y, points)
    width = np.maximum(rng.uniform(1.1, 1.9) * (1 - 0.8 * along), 0.6 * canvas.pixel)
    return albedo * (1 - rng.uniform(0.45, 0.75) * _cover(distance - width, canvas) * inside)[..., None]


def _stain(albedo: Field, canvas: Canvas, rng: Generator, centre: NDArray, colour: NDArray) -> Field:
    """Multiply an uneven spot by a colour."""
    distance = _blob(canvas, rng, centre, rng.uniform(8, 18))
    soft = _smooth(0.5 - distance / 5) * (1 + 0.12 * _noise(canvas.x, canvas.y, rng, 4))
    return albedo * (1 - soft[..., None] * (1 - colour))


# --- Parts ----------------------------------------------------------------------------------------------------------


def _slate(canvas: Canvas, rng: Generator) -> Field:
    """A dark table."""
    return np.array([0.27, 0.33, 0.38]) * (
        1 + 0.02 * _noise(canvas.x, canvas.y, rng, 2.5) + 0.03 * _noise(canvas.x, canvas.y, rng, 40)
    )[..., None].astype(np.float32)


def _paper(canvas: Canvas, rng: Generator) -> Field:
    """A bright table."""
    return np.array([0.72, 0.73, 0.71]) * (
        1 + 0.012 * _noise(canvas.x, canvas.y, rng, 1.5) + 0.02 * _noise(canvas.x, canvas.y, rng, 60)
    )[..., None].astype(np.float32)


def _bracket(canvas: Canvas, rng: Generator, flaw: str, chance: Generator, ground: Ground | None = None) -> Field:
    """A brushed steel plate with holes: always the same way up, a little shifted and turned."""
    light = _light(rng) if ground is None else ground.light
    x, y = _turn(canvas.x, canvas.y, 128 + rng.normal(0, 3, 2), np.radians(rng.normal(0, 1.8)))
    table = _slate(canvas, rng) if ground is None else ground.scene

    plate = np.minimum(_box(x, y - 22, (100, 46), 15), _box(x, y + 20, (50, 70), 34))
    screws = [(-78, 2), (78, 2), (-78, 46), (78, 46)]
    missing = int(chance.integers(len(screws))) if flaw == "missing_hole" else None
    holes = [_circle(x, y, centre, 10) for number, centre in enumerate(screws) if number != missing]
    holes += [_circle(x, y, (0, -34), 24), _box(x, y - 36, (34, 8), 8)]
    distance = np.maximum(plate, -np.minimum.reduce(holes))
    cover = _cover(distance, canvas)

    height = 4 * np.sqrt(_smooth(-distance / 5))
    brushed = _noise(x, y, rng, (60, 1.1)) + 0.7 * _noise(x, y, rng, (25, 2.5))
    glow = np.exp(-(((x * 0.9 + y * 0.35 - rng.normal(-15, 22)) / 70) ** 2))
    albedo = (0.57 + 0.024 * brushed + 0.17 * glow)[..., None] * np.array([1, 1.01, 1.03])
    albedo = albedo * (1 + 0.045 * _noise(x, y, rng, 32))[..., None]
    face = distance < -7
    if flaw == "dent":
        centre = _pick(chance, canvas, distance < -12)
        u, v = _turn(canvas.x, canvas.y, centre, chance.uniform(0, np.pi))
        radius = chance.uniform(6, 10)
        height = height - chance.uniform(1.4, 3) * np.exp(-((u / radius) ** 2) - (v / (0.7 * radius)) ** 2)
    elif flaw == "scratch":
        albedo = _scratch(albedo, canvas, chance, face)
    elif flaw == "stain":
        colour = np.array([0.84, 0.74, 0.60]) + chance.uniform(-0.08, 0.08)
        albedo = _stain(albedo, canvas, chance, _pick(chance, canvas, face), colour)
    part = _shade(albedo, height, light, canvas, gloss=0.35, shine=24)
    return _mix(_shadow(table, cover, light, canvas, 9), part, cover)


def _gear(canvas: Canvas, rng: Generator, flaw: str, chance: Generator, ground: Ground | None = None) -> Field:
    """A turned brass gear at any angle."""
    light = _light(rng) if ground is None else ground.light
    x, y = _turn(canvas.x, canvas.y, 128 + rng.normal(0, 2, 2), rng.uniform(0, 2 * np.pi))
    table = _paper(canvas, rng) if ground is None else ground.scene

    teeth = 16
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    rim = 90 + 9 * np.tanh(2.2 * np.cos(teeth * angle))
    slope = 9 * 2.2 * teeth * np.sin(teeth * angle) / np.cosh(2.2 * np.cos(teeth * angle)) ** 2
    # Divided by its slope, the radial distance is right along the flanks; the disc keeps it right below the teeth.
    outline = np.minimum((radius - rim) / np.hypot(1, slope / radius.clip(60)), radius - 81.2)
    if flaw == "broken_tooth":
        at = 2 * np.pi * int(chance.integers(teeth)) / teeth
        tip = 103 * np.array([np.cos(at), np.sin(at)])
        local = Canvas(x, y, canvas.pixel)
        outline = np.maximum(outline, -_blob(local, chance, tip, chance.uniform(11, 15)))
    spokes = 2 * np.pi * (np.arange(6) + 0.5) / 6
    holes = [_circle(x, y, (50 * np.cos(spoke), 50 * np.sin(spoke)), 12) for spoke in spokes]
    holes += [_circle(x, y, (0, 0), 13), _box(x - 13, y, (5, 3.5), 0.5)]
    distance = np.maximum(outline, -np.minimum.reduce(holes))
    cover = _cover(distance, canvas)

    height = 3.5 * np.sqrt(_smooth(-distance / 4)) + 3 * _smooth((30 - radius) / 3) + 2 * _smooth((radius - 70) / 3)
    rings = _noise(radius, np.zeros_like(radius), rng, 1.4) + 0.5 * _noise(radius * 3, angle * 20, rng, 3)
    # A turned face mirrors the lamp along one direction, whatever the gear's angle.
    seen = np.arctan2(canvas.y - 128, canvas.x - 128)
    glow = np.cos(2 * (seen - np.arctan2(light[1], light[0]))) * _smooth(radius / 30)
    albedo = (0.74 + 0.02 * rings + 0.07 * glow)[..., None] * (np.array([1, 0.80, 0.46]) * rng.normal(1, 0.02, 3))
    face = distance < -5
    if flaw == "scratch":
        albedo = _scratch(albedo, canvas, chance, face & (radius < 82))
    elif flaw == "crack":
        spoke = chance.choice(spokes) + chance.uniform(-0.1, 0.1)
        start = np.array([np.cos(spoke), np.sin(spoke)]) * 62
        points = _zigzag(chance, start, spoke + chance.uniform(-0.6, 0.6), chance.uniform(22, 36))
        albedo = _crack(albedo, Canvas(x, y, canvas.pixel), points, chance, cover)
    elif flaw == "contamination":
        for _ in range(int(chance.integers(1, 4))):
            spot = _blob(canvas, chance, _pick(chance, canvas, face), chance.uniform(2.5, 7))
            albedo = _mix(albedo, albedo * chance.uniform(0.4, 0.65), _cover(spot, canvas))
            height = height + 1.5 * _smooth(-spot / 4)
    part = _shade(albedo, height, light, canvas, gloss=0.4, shine=20)
    return _mix(_shadow(table, cover, light, canvas, 9), part, cover)


def _fabric(canvas: Canvas, rng: Generator, flaw: str, chance: Generator) -> Field:
    """Blue and pale threads in a twill weave: two over, two under."""
    light = _light(rng)
    x, y = _turn(canvas.x, canvas.y, rng.uniform(0, 256, 2), np.radians(rng.normal(0, 2.5)))
    x, y = x + 1.6 * _noise(x, y, rng, 60) + 600, y + 1.6 * _noise(x, y, rng, 60) + 600
    pitch = 7.0
    column, row = np.floor(x / pitch).astype(int) % 256, np.floor(y / pitch).astype(int) % 256
    across_x, across_y = 2 * ((x / pitch) % 1) - 1, 2 * ((y / pitch) % 1) - 1
    warp_tone, weft_tone = rng.normal(1, 0.055, 256).astype(np.float32), rng.normal(1, 0.05, 256).astype(np.float32)

    # Both waves have the same phase in the middle of a crossing, so that one thread is up where the other is down.
    warp = np.cos(np.pi / 2 * (y / pitch + column - 1)) + 1.2 * np.sqrt(1 - across_x**2 * 0.98)
    weft = -np.cos(np.pi / 2 * (x / pitch + row - 1)) + 1.2 * np.sqrt(1 - across_y**2 * 0.98)
    warp_colour = np.array([0.20, 0.31, 0.50]) * rng.normal(1, 0.03) * warp_tone[column][..., None]
    weft_colour = np.array([0.66, 0.68, 0.70]) * rng.normal(1, 0.03) * weft_tone[row][..., None]
    if flaw in {"missing_thread", "wrong_colour"}:
        centre = _pick(chance, canvas, np.hypot(canvas.x - 128, canvas.y - 128) < 85)
        near = np.hypot(canvas.x - centre[0], canvas.y - centre[1])
        half, is_weft = chance.uniform(25, 60), bool(chance.integers(2)) or flaw == "missing_thread"
        threads = row if is_weft else column
        chosen = (threads == threads.flat[near.argmin()]) & (near < half)
        if flaw == "missing_thread":
            weft = np.where(chosen, -2.5, weft)
        elif is_weft:
            weft_colour = np.where(chosen[..., None], weft_colour * [1.0, 0.72, 0.50], weft_colour)
        else:
            warp_colour = np.where(chosen[..., None], warp_colour * [1.9, 1.0, 0.75], warp_colour)

    upper = _smooth(0.5 + (weft - warp) / 0.5)
    height = np.maximum(warp, weft)
    fibres = _noise(x, y, rng, (1.2, 5)) * (1 - upper) + _noise(x, y, rng, (5, 1.2)) * upper
    albedo = _mix(warp_colour, weft_colour, upper) * (1 + 0.06 * fibres + 0.03 * _noise(x, y, rng, 40))[..., None]
    albedo = albedo * (0.55 + 0.45 * _smooth((height + 0.4) / 2))[..., None]  # little light falls between threads
    if flaw == "stain":
        centre = _pick(chance, canvas, np.hypot(canvas.x - 128, canvas.y - 128) < 95)
        albedo = _stain(albedo, canvas, chance, centre, np.array([0.76, 0.70, 0.62]) + chance.uniform(-0.08, 0.06))
    cloth = _shade(albedo, height, light, canvas, gloss=0.0, shine=1)
    if flaw == "cut":
        centre = _pick(chance, canvas, np.hypot(canvas.x - 128, canvas.y - 128) < 85)
        points = _stroke(chance, centre, chance.uniform(25, 60), chance.uniform(0, 0.5))
        distance, along = _line(canvas.x, canvas.y, points)
        width = chance.uniform(1.5, 3) * np.sin(np.pi * along.clip(0.02, 0.98)) + 0.5 * canvas.pixel
        gap = distance - width + 0.8 * _noise(x, y, chance, 1.5)
        cloth = _mix(cloth, cloth * 1.15 + 0.05, 0.8 * _cover(gap - 1.5, canvas))  # frayed, brighter ends
        cloth = _mix(cloth, np.array([0.13, 0.13, 0.15]), _cover(gap, canvas))
    return cloth


def _pills(canvas: Canvas, rng: Generator, flaw: str, chance: Generator) -> Field:
    """Nine tablets in a tray, each at its own place and angle in its well."""
    light = _light(rng)
    x, y = _turn(canvas.x, canvas.y, 128 + rng.normal(0, 1.5, 2), np.radians(rng.normal(0, 0.8)))
    step, radius = 76.0, 24.0
    cell_x = np.clip(np.floor(x / step + 1.5), 0, 2).astype(int)
    cell_y = np.clip(np.floor(y / step + 1.5), 0, 2).astype(int)
    well_x, well_y = x - step * (cell_x - 1), y - step * (cell_y - 1)
    well = np.hypot(well_x, well_y) - 33

    tray_height = -5 * _smooth(0.5 - well / 5)
    grain = _noise(canvas.x, canvas.y, rng, 1.6)
    plastic = np.array([0.20, 0.33, 0.36]) * (1 + 0.03 * grain - 0.25 * _cover(well, canvas))[..., None]
    tray = _shade(plastic, tray_height, light, canvas, gloss=0.3, shine=30)

    offset, angle = rng.normal(0, 2.2, (2, 3, 3)).clip(-5, 5), rng.uniform(0, np.pi, (3, 3))
    tone = rng.normal(1, 0.015, (3, 3, 1)) * rng.normal(1, 0.008, (3, 3, 3))
    base = np.array([0.93, 0.80, 0.70]) * rng.normal(1, 0.012, 3)
    u, v = well_x - offset[0][cell_y, cell_x], well_y - offset[1][cell_y, cell_x]
    turned = np.cos(angle[cell_y, cell_x]) * v - np.sin(angle[cell_y, cell_x]) * u
    chosen = chance.integers(3, size=2)
    is_chosen = (cell_y == chosen[0]) & (cell_x == chosen[1])
    pill = Canvas(
        np.where(is_chosen, u, 1e3).astype(np.float32), np.where(is_chosen, v, 1e3).astype(np.float32), canvas.pixel
    )

    distance = np.hypot(u, v) - radius
    if flaw == "chipped":
        at = chance.uniform(0, 2 * np.pi)
        edge = (radius + 3) * np.array([np.cos(at), np.sin(at)])
        distance = np.maximum(distance, -_blob(pill, chance, edge, chance.uniform(7, 11)))
    cover = _cover(distance, canvas)
    height = 7 * np.sqrt(_smooth(-distance / 12)) - 1.6 * np.exp(-((turned / 1.5) ** 2))
    powder = 0.012 * _noise(canvas.x, canvas.y, rng, 1.3) + 0.012 * _noise(canvas.x, canvas.y, rng, 5)
    dye = tone * base
    if flaw == "wrong_colour":
        shift = np.array([[-0.10, -0.02, 0.06], [0.02, -0.09, -0.08], [-0.04, 0.04, -0.10]])[chance.integers(3)]
        dye[chosen[0], chosen[1]] += shift * chance.uniform(0.8, 1.3)
    albedo = dye[cell_y, cell_x] * (1 + powder)[..., None]
    if flaw == "crack":
        start = radius * np.array([np.cos(at := chance.uniform(0, 2 * np.pi)), np.sin(at)])
        albedo = _crack(albedo, pill, _zigzag(chance, start, at + np.pi, chance.uniform(20, 40)), chance, cover)
    elif flaw == "speck":
        for _ in range(int(chance.integers(1, 4))):
            place = chance.uniform(0, 0.75 * radius) * np.array([np.cos(at := chance.uniform(0, 6.3)), np.sin(at)])
            spot = _blob(pill, chance, place, chance.uniform(2.2, 3.8))
            albedo = _mix(albedo, np.array([0.38, 0.27, 0.20]) * chance.uniform(0.8, 1.5), 0.8 * _cover(spot, canvas))
    tablets = _shade(albedo, height, light, canvas, gloss=0.12, shine=12)
    return _mix(_shadow(tray, cover, light, canvas, 7), tablets, cover)


@dataclass(frozen=True)
class _Scatter:
    """Parts at random places.

    Attributes:
        part (Callable): Paints one of them on a given ground.
        table (Callable): Paints what they lie on.
        parts (int): How many.
        scale (float): Their size in proportion to that of the part alone.
        radius (float): Of a circle around the part alone, shadow included, in units.
        turned (bool): Lay them at any angle; False of what its painter turns by itself.
    """

    part: Callable[..., Field]
    table: Callable[[Canvas, Generator], Field]
    parts: int
    scale: float
    radius: float
    turned: bool

    def __call__(self, canvas: Canvas, rng: Generator, flaw: str, chance: Generator) -> Field:
        """Lay the parts on a table, one of them with the flaw."""
        ground = Ground(self.table(canvas, rng), _light(rng))
        places = _apart(rng, self.parts, self.scale * self.radius)
        flawed = int(chance.integers(self.parts))
        for number, place in enumerate(places):
            x, y = _turn(canvas.x, canvas.y, place, rng.uniform(0, 2 * np.pi) if self.turned else 0.0)
            own = Canvas(128 + x / self.scale, 128 + y / self.scale, canvas.pixel / self.scale)
            scene = self.part(own, rng, flaw if number == flawed else GOOD, chance, ground)
            ground = ground._replace(scene=scene)
        return ground.scene


def _apart(rng: Generator, count: int, radius: float) -> NDArray:
    """Places ``(count, 2)`` of discs that do not overlap, inside of the image."""
    while True:
        places = rng.uniform(radius, UNITS - radius, (count, 2))
        if all(np.hypot(*(one - other)) > 2 * radius for one, other in combinations(places, 2)):
            return places


_SCATTERED = {
    "loose_brackets": _Scatter(_bracket, _slate, parts=2, scale=0.46, radius=122, turned=True),
    "loose_gears": _Scatter(_gear, _paper, parts=3, scale=0.4, radius=106, turned=False),
}
_PAINTERS: dict[str, Callable[[Canvas, Generator, str, Generator], Field]] = {
    "bracket": _bracket,
    "gear": _gear,
    "fabric": _fabric,
    "pills": _pills,
    **_SCATTERED,
}
