"""Pictures of random shapes: labelled objects, round or long, on an unlabelled background.

The idea is synthetic training beyond any one organ (Dey et al., "AnyStar: Domain randomized universal star-convex 3D
instance segmentation", WACV 2024; Billot et al., "SynthSeg", Medical Image Analysis 2023). A network learns not to
depend on what is random here, such as colours, sizes, textures and blur. Unnamed numbers are proportions chosen by eye.

Convention: images are HxWx3, about 0..1 while they are drawn; lengths are in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates

Array = np.ndarray

_LEAST_CONTRAST = 0.18  # between the objects and the background, in the channel with the largest difference
_MOST_OBJECTS = 220
_MOST_BRANCHES = 60
_MARGIN = 4  # objects may lie this far outside


@dataclass(frozen=True)
class _Tones:
    """Colours of a picture, with three channels each; `other` is nearer to the background than the objects are."""

    background: Array
    objects: Array
    other: Array


def random_shapes(size: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw a picture and its label.

    Args:
        size: side of the square picture in pixels.
        rng: source of all random numbers.

    Returns:
        colours 3x`size`x`size` in 0..255, and labels `size`x`size`: 1 on the objects, 0 elsewhere; both uint8. Six of
        ten pictures are grey: half of these have equal channels, in the others they are neighbouring slices. The
        objects of three in ten pictures are branching tubes. A few pictures have no object.
    """
    is_grey = rng.random() < 0.6
    tones = _draw_tones(rng, is_grey)
    image = _draw_background(size, tones, rng, is_grey)
    label = np.zeros((size, size), np.uint8)
    draw = _draw_tubes if rng.random() >= 0.7 else _draw_objects
    draw(image, label, tones, rng)
    has_neighbours = is_grey and rng.random() < 0.5
    if has_neighbours:
        image = _between_neighbours(image, rng)
    return _expose(image, tones, rng, is_grey and not has_neighbours), label


def _draw_tones(rng: np.random.Generator, is_grey: bool) -> _Tones:
    while True:
        background, objects, other = rng.uniform(0, 1, (3, 1)).repeat(3, 1) if is_grey else rng.uniform(0, 1, (3, 3))
        if np.abs(background - objects).max() > _LEAST_CONTRAST:
            break
    if rng.random() < 0.5:
        other = background + (other - 0.5) * 0.5
    else:
        other = background + (objects - background) * rng.uniform(-0.6, 0.5)
    return _Tones(background, objects, other)


def _draw_background(size: int, tones: _Tones, rng: np.random.Generator, is_grey: bool) -> Array:
    """Draw the unlabelled background: texture, regions of other tones with soft edges, fibres."""
    image = np.tile(tones.background, (size, size, 1))
    image += _texture(size, rng) * rng.uniform(0, 0.08) * (1 if is_grey else rng.uniform(0.3, 1, 3))
    for chance in (0.6, 0.25):
        if rng.random() < chance:
            inside = _field(size, rng.uniform(15, 80), rng) > rng.normal(0, 0.7)
            region = gaussian_filter(inside.astype(float), rng.uniform(0.5, 3))[..., None]
            image += region * (tones.other + _texture(size, rng) * rng.uniform(0, 0.1) - image)
    if rng.random() < 0.3:
        line = np.abs(_field(size, rng.uniform(10, 40), rng)) < rng.uniform(0.02, 0.1)
        fibres = gaussian_filter(line.astype(float), rng.uniform(0.3, 1))[..., None] * rng.uniform(0.3, 1)
        image += fibres * (tones.other + (tones.objects - tones.background) * rng.uniform(-0.3, 0.5) - image)
    return image


def _draw_objects(image: Array, label: Array, tones: _Tones, rng: np.random.Generator) -> None:
    """Draw objects of one kind onto the picture and its label, after a few of another kind onto the picture alone."""
    size, contrast = len(image), tones.objects - tones.background
    radius, length = np.exp(rng.uniform(np.log(2.5), np.log(24))), np.exp(abs(rng.normal(0, 0.35)))
    spread, roughness, edge = rng.uniform(0.05, 0.4), rng.uniform(0, 0.18), rng.uniform(0.3, 1.5)
    texture = _texture(size, rng) * rng.uniform(0, 0.15)
    rim = rng.uniform(-0.2, 0.2) if rng.random() < 0.4 else 0.0
    halo = image.mean((0, 1)) + (tones.other - tones.background) * rng.uniform(0.3, 1) if rng.random() < 0.25 else None

    if rng.random() < 0.35:
        others_radius = radius * (rng.uniform(2.2, 4) if rng.random() < 0.6 else rng.uniform(0.25, 0.45))
        for centre in _scatter(size, int(rng.integers(1, 8)), rng, clustered=False):
            blob = _blob(others_radius, np.exp(abs(rng.normal(0, 0.3))), rng.uniform(0, np.pi), roughness, rng)
            _paint(image, blob, centre, tones.other + contrast * rng.uniform(-0.2, 0.35), soft=2 * edge)

    covered = rng.uniform(0, 0.6) ** 1.3
    least = 0 if rng.random() < 0.1 else 1
    count = int(np.clip(covered * size**2 / (np.pi * radius**2), least, _MOST_OBJECTS))
    differing, angle, aligned = rng.uniform(0, 0.4), rng.uniform(0, np.pi), rng.random() < 0.4
    for centre in _scatter(size, count, rng, clustered=rng.random() < 0.4):
        blob = _blob(
            radius * np.exp(rng.normal(0, spread)),
            length * np.exp(rng.normal(0, 0.15)),
            angle + rng.normal(0, 0.25) if aligned else rng.uniform(0, np.pi),
            roughness,
            rng,
        )
        strength = max(0.25, 1 + rng.normal(0, differing))
        colour = tones.background + contrast * strength
        _paint(image, blob, centre, colour, soft=edge, texture=texture, rim=rim, halo=halo, label=label)


def _draw_tubes(image: Array, label: Array, tones: _Tones, rng: np.random.Generator) -> None:
    """Draw branching tubes, such as vessels, onto the picture and its label, after a few blobs on the picture alone."""
    size, contrast = len(image), tones.objects - tones.background
    if rng.random() < 0.5:
        for centre in _scatter(size, int(rng.integers(1, 6)), rng, clustered=False):
            blob = _blob(rng.uniform(3, 25), np.exp(abs(rng.normal(0, 0.3))), rng.uniform(0, np.pi), 0.1, rng)
            _paint(image, blob, centre, tones.other + contrast * rng.uniform(-0.3, 0.3), soft=rng.uniform(1, 6))
    radii, widest = _grow_branches(size, rng)
    if not radii.any():
        return
    distance, (rows, columns) = distance_transform_edt(radii == 0, return_indices=True)
    radius = radii[rows, columns]  # of the tube that is nearest
    depth = radius - distance
    strength = np.clip(1 + rng.uniform(0, 0.3) * _field(size, 30, rng), 0.35, 1.3)
    reflex = 1 - rng.uniform(0, 0.4) * (rng.random() < 0.4) * np.clip(depth / widest, 0, 1) ** 2
    faint = np.clip(rng.uniform(0.5, 1) + radius / 2, 0, 1)  # thin tubes have less contrast
    colour = tones.background + contrast * (strength * reflex * faint)[..., None]
    image += np.clip(depth / rng.uniform(0.8, 2) + 0.5, 0, 1)[..., None] * (colour - image)
    label[depth > 0] = 1


def _grow_branches(size: int, rng: np.random.Generator) -> tuple[Array, float]:
    """Draw centre lines of branching tubes: their radius `size`x`size`, 0 elsewhere, and the largest possible one."""
    radii = np.zeros((size, size))
    widest, wavy = np.exp(rng.uniform(np.log(0.8), np.log(7))), rng.uniform(0.02, 0.15)
    branches = [
        (rng.uniform(0, size, 2), rng.uniform(0, 2 * np.pi), widest * rng.uniform(0.4, 1))
        for _ in range(rng.integers(1, 7))
    ]
    for _ in range(_MOST_BRANCHES):
        if not branches:
            break
        place, angle, radius = branches.pop(0)
        turn = 0.0
        for _ in range(int(rng.uniform(0.2, 1.0) * size)):
            turn = 0.85 * turn + rng.normal(0, wavy / 4)
            angle += turn
            place = place + np.array([np.sin(angle), np.cos(angle)])
            radius *= 0.998
            row, column = np.floor(place).astype(int)
            if not (0 <= row < size and 0 <= column < size):
                break
            radii[row, column] = max(radii[row, column], radius)
            if radius > 0.6 and rng.random() < 0.025:
                share = rng.uniform(0.4, 0.9)
                branches.append((place, angle + rng.choice((-1, 1)) * rng.uniform(0.3, 1.2), radius * share))
                radius *= max(share, np.sqrt(1 - share**2)) ** 0.5
    return radii, widest


def _between_neighbours(image: Array, rng: np.random.Generator) -> Array:
    """Replace the first and last channel of a grey picture by those of neighbouring slices, where shapes have moved."""
    size, scale, reach = len(image), rng.uniform(10, 40), rng.uniform(0, 3)
    shift = reach * np.stack([_field(size, scale, rng), _field(size, scale, rng)])
    places = np.mgrid[:size, :size]
    moved = [map_coordinates(image[..., 1], places + side * shift, order=1, mode="nearest") for side in (-1, 1)]
    return np.stack([moved[0], image[..., 1], moved[1]], axis=2)


def _expose(image: Array, tones: _Tones, rng: np.random.Generator, is_grey: bool) -> Array:
    """Blur, light unevenly, add noise, stretch to the full range or less, and bend the range by a gamma."""
    size = len(image)
    if rng.random() < 0.5:
        image = gaussian_filter(image, rng.uniform(0, 1.5), axes=(0, 1))
    if rng.random() < 0.4:
        light = np.clip(1 + 0.35 * _field(size, rng.uniform(40, 120), rng), 0.25, 2)
        image = tones.background + (image - tones.background) * light[..., None]
    if rng.random() < 0.3:
        image = image + 0.1 * _field(size, rng.uniform(40, 120), rng)[..., None]
    image = image + rng.standard_normal((size, size, 1 if is_grey else 3)) * rng.uniform(0, 0.06)
    low, high = np.percentile(image, [0.5, 99.5])
    image = (image - low) / max(high - low, 1e-6)
    if rng.random() < 0.3:
        image = image * rng.uniform(0.5, 1) + rng.uniform(0, 0.3)
    image = np.clip(image, 0, 1) ** np.exp(rng.normal(0, 0.35))
    return (255 * image).astype(np.uint8).transpose(2, 0, 1)


def _field(size: int, scale: float, rng: np.random.Generator) -> Array:
    """Draw a random field `size`x`size` of unit variance that is smooth over about `scale` pixels."""
    count = int(np.ceil(size / scale)) + 1
    if count >= size:
        return rng.standard_normal((size, size))
    coarse = torch.from_numpy(rng.standard_normal((1, 1, count, count)))
    field = F.interpolate(coarse, size=(size, size), mode="bilinear" if scale < 6 else "bicubic")[0, 0].numpy()
    return field / (field.std() + 1e-6)


def _texture(size: int, rng: np.random.Generator) -> Array:
    """Draw the sum of two fields of different scales, `size`x`size`x1."""
    scales = np.exp(rng.uniform(0, np.log(40), 2))
    return ((_field(size, scales[0], rng) + _field(size, scales[1], rng)) / np.sqrt(2))[..., None]


def _scatter(size: int, count: int, rng: np.random.Generator, *, clustered: bool) -> Array:
    """Draw centres `count`x2, anywhere or around one to four places."""
    if not clustered:
        return rng.uniform(-_MARGIN, size + _MARGIN, (count, 2))
    places = rng.uniform(0, size, (rng.integers(1, 5), 2))
    return places[rng.integers(0, len(places), count)] + rng.normal(0, size * rng.uniform(0.08, 0.25), (count, 2))


def _blob(radius: float, length: float, angle: float, roughness: float, rng: np.random.Generator) -> Array:
    """Return the depth in pixels below the surface of an ellipse with a rough outline, negative outside it."""
    long, short = radius * np.sqrt(length), radius / np.sqrt(length)
    reach = int(np.ceil(1.5 * long)) + 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    along = (x * np.cos(angle) + y * np.sin(angle)) / long
    across = (y * np.cos(angle) - x * np.sin(angle)) / short
    around, outline = np.arctan2(across, along), np.ones_like(along)
    for waves in range(2, 6):
        outline += roughness * rng.standard_normal() / waves * np.cos(waves * around + rng.uniform(0, 2 * np.pi))
    return radius * (outline - np.hypot(along, across))


def _paint(
    image: Array,
    blob: Array,
    centre: Array,
    colour: Array,
    *,
    soft: float,
    texture: Array | None = None,
    rim: float = 0.0,
    halo: Array | None = None,
    label: Array | None = None,
) -> None:
    """Paint a blob with an edge `soft` pixels wide onto a picture and, if given, its label, cut at their borders."""
    size, first = len(image), np.floor(centre).astype(int) - len(blob) // 2
    start, stop = np.maximum(first, 0), np.minimum(first + len(blob), size)
    if (start >= stop).any():
        return
    place = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
    depth = blob[tuple(slice(low, high) for low, high in zip(start - first, stop - first, strict=True))]
    shown = image[place]
    if halo is not None:
        shown += 0.8 * np.clip(depth / 3 + 1, 0, 1)[..., None] * (halo - shown)
    paint = colour + rim * np.exp(-np.abs(depth) / 1.5)[..., None]
    if texture is not None:
        paint = paint + texture[place]
    shown += np.clip(depth / soft + 0.5, 0, 1)[..., None] * (paint - shown)
    if label is not None:
        label[place][depth > 0] = 1
