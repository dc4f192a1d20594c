"""Filled polygons: points along curves, outlines around them, and their pixels. Nothing here knows what is drawn.

Points are [F or 1, n, 2 or 3]: one polygon per frame, or one for all. `rasterise` takes shapes in the frame's unit square, from back
to front, and gives frames uint8[F, size, size, 3] (RGB) of any size. Only the filling loops over frames.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

Colour = tuple[float, float, float]  # RGB, 0..255
Points = Float[np.ndarray, "..."]  # [F or 1, n, 2 or 3]

CURVE_STEPS = 5  # points of a curve per control point
SUPERSAMPLING = 2  # canvas pixels per frame pixel, along each side ...
LEAST_CANVAS = 256  # ... or more, so that small frames are as exact as large ones
SPILL = 0.63  # pixels that OpenCV's anti-aliased polygons are too large, on every side
SHADE_GRID = 64  # pixels of the canvas on which soft shades are painted, whatever the size of the frame


class Shape(NamedTuple):
    """A filled polygon per frame, in the frame's unit square; its shades are painted softly, and only within it."""

    points: Float[np.ndarray, "F n 2"]
    colour: Colour
    shades: tuple[Shape, ...] = ()


def xy(x, y) -> Points:
    """Points [F or 1, n, 2] from coordinates that broadcast against each other."""
    return np.stack(np.broadcast_arrays(np.atleast_2d(x), np.atleast_2d(y)), -1)


def ellipse(x, y, rx, ry, count: int = 24) -> Points:
    angle = np.arange(count) * 2 * np.pi / count
    return xy(x + rx * np.cos(angle), y + ry * np.sin(angle))


def between(x, top, bottom) -> Points:
    """The polygon between two curves over the same x [F or 1, n]."""
    there, back = xy(x, top), xy(x, bottom)
    there, back = np.broadcast_arrays(there, back)
    return np.concatenate([there, back[:, ::-1]], 1)


def stroke(points: Points, width) -> Points:
    """The polygon of a line of the given width ([n], or a number) along open points [F, n, 2]."""
    normal = np.gradient(points, axis=1)[..., ::-1] * (-1, 1)
    normal *= np.asarray(width)[..., None] / 2 / (np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-9)
    return np.concatenate([points + normal, (points - normal)[:, ::-1]], 1)


def offset(points: Points, distance: float) -> Points:
    """A closed polygon [F, n, 2], its edge moved outwards by `distance`."""
    tangent = np.roll(points, -1, 1) - np.roll(points, 1, 1)
    normal = tangent[..., ::-1] * (1, -1)
    area = (points[..., 0] * np.roll(points[..., 1], -1, 1) - points[..., 1] * np.roll(points[..., 0], -1, 1)).sum(1)
    return points + distance * np.sign(area)[:, None, None] * normal / (np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-9)


def catmull_rom(control, *, closed: bool) -> Points:
    """A Catmull-Rom curve [1, n, 2] through control points [k, 2]."""
    p = np.asarray(control, float)
    p = np.concatenate([p[-1:], p, p[:2]] if closed else [p[:1], p, p[-1:]])
    t = (np.arange(CURVE_STEPS) / CURVE_STEPS)[:, None, None]
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))  # [steps, k, 2]
    return np.concatenate([curve.transpose(1, 0, 2).reshape(-1, 2), p[-2:-1]][: 1 if closed else 2])[None]


def mix(a: Colour, b: Colour, amount: float) -> Colour:
    return tuple(float(p + (q - p) * amount) for p, q in zip(a, b, strict=True))


def _gradient(first: Colour, last: Colour, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """From the top left to the bottom right."""
    ramp = (np.arange(side) + 0.5) / side
    amount = 0.3 * ramp[None, :, None] + 0.7 * ramp[:, None, None]
    return (np.array(first) * (1 - amount) + np.array(last) * amount).astype(np.uint8)


def rasterise(
    shapes: list[Shape],
    backdrop: tuple[Colour, Colour],
    *,
    size: int,
    softness: float,
) -> UInt8[np.ndarray, "F {size} {size} 3"]:
    """Draws every frame on a large canvas, with anti-aliased edges, and shrinks it.

    `backdrop`: colours of the gradient behind the shapes, top left and bottom right; `softness`: blur of the shades, in pixels of
    their grid.
    """
    side, shift = size * max(SUPERSAMPLING, -(-LEAST_CANVAS // size)), 6
    empty = _gradient(*backdrop, side)

    def fixed_point(shape, scale):
        # Anti-aliasing lets a polygon spill over its edge; drawn that much smaller it has its true size at any resolution.
        points = offset(shape.points, -SPILL / scale)
        return np.round((points * scale - 0.5) * 2**shift).astype(np.int32)

    def shades_of(shape):
        return [(fixed_point(shade, SHADE_GRID), shade.colour) for shade in shape.shades]

    polygons = [(fixed_point(shape, side), shape.colour, shades_of(shape)) for shape in shapes]
    frames = np.empty((len(shapes[0].points), size, size, 3), np.uint8)
    small, mask = np.empty((SHADE_GRID, SHADE_GRID, 3), np.uint8), np.empty((side, side), np.uint8)
    for index, frame in enumerate(frames):
        canvas = empty.copy()
        for points, colour, shades in polygons:
            cv2.fillPoly(canvas, [points[index]], colour, cv2.LINE_AA, shift)
            if shades:
                small[:] = colour
                for soft_points, soft_colour in shades:
                    cv2.fillPoly(small, [soft_points[index]], soft_colour, cv2.LINE_AA, shift)
                painted = cv2.resize(cv2.GaussianBlur(small, (0, 0), softness), (side, side), interpolation=cv2.INTER_LINEAR)
                mask[:] = 0
                cv2.fillPoly(mask, [points[index]], 255, cv2.LINE_AA, shift)
                # Pixels on the edge keep the anti-aliased colour; only those wholly inside take the shade.
                cv2.copyTo(painted, cv2.threshold(mask, 254, 255, cv2.THRESH_BINARY)[1], canvas)
        cv2.resize(canvas, (size, size), dst=frame, interpolation=cv2.INTER_AREA)
    return frames
