"""Rendered portraits: people who do not exist, drawn as polygons. Any motion can be put on any identity, so pairs are exact.

In: seeds. Out: frames uint8[F, size, size, 3] (RGB), and the 68 iBUG landmarks float32[F, 68, 2] in pixels, which are points of the
drawn geometry, not estimates. `pair` renders two identities under one motion; run as a program, the module writes a dataset of pairs.

Geometry lives in head units: origin in the middle of the head, x right, y down, z towards the viewer, crown at y=-1, chin at y=+1.
`_project` turns it by the motion's pose and brings it to the frame's unit square; `_rasterise` draws it at any size. All frames of a
clip are computed at once, [F, n, 3], and only the filling of polygons loops over frames.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pathlib
from typing import Literal, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8
from tqdm import tqdm

from svdp_jax.config import ConfigError
from svdp_jax.data import clips

Split = Literal["train", "validation", "test"]
Colour = tuple[float, float, float]
Points = Float[np.ndarray, "..."]  # [F or 1, n, 2 or 3]

HEAD_UNIT = 0.29  # half a head's height, in sides of the frame
HEAD_CENTRE = 0.5, 0.475  # of the frame, at rest
SUPERSAMPLING = 2  # canvas pixels per frame pixel, along each side ...
LEAST_CANVAS = 256  # ... or more, so that small frames are as exact as large ones
SPILL = 0.63  # pixels that OpenCV's anti-aliased polygons are too large, on every side
SHADE_GRID = 64  # pixels of the canvas on which soft shades are painted, whatever the size of the frame
OUTLINE_DEPTH = 0.2  # of the head's outline, in head units
EYE_X, EYE_Y = 0.41, -0.1  # of an eye's middle
U = np.linspace(-1, 1, 17)[None]  # where lids, lips and brows are sampled, from their left end to their right
DISC = np.sin(np.linspace(-np.pi / 2, np.pi / 2, 15))[None]  # where discs are
PAIRS_PER_SHARD = 25
SEED_STRIDE = 2**20  # pairs between the first ones of two seeds

MOUTH_INSIDE = (112, 18, 34)  # the same for everyone: the mouth's opening is then easy to read
TONGUE, TEETH = (206, 84, 92), (250, 246, 240)
LIGHT, EYE_WHITE, EYE_SHADE, PUPIL = (255, 250, 240), (252, 250, 247), (218, 216, 228), (24, 20, 26)

SKIN = ((255, 222, 198), (247, 203, 170), (233, 180, 140), (212, 152, 112), (172, 116, 82), (130, 86, 62))
HAIR = ((44, 34, 40), (86, 56, 44), (140, 88, 52), (222, 174, 100), (196, 88, 50), (158, 158, 172), (122, 64, 108), (52, 72, 118))
IRIS = ((70, 130, 190), (86, 150, 96), (120, 74, 40), (150, 106, 44), (92, 96, 120))
CLOTHES = ((32, 128, 132), (232, 100, 86), (232, 172, 62), (52, 70, 128), (124, 66, 116), (58, 116, 84), (242, 234, 222), (66, 68, 80))
BACKDROP = (
    ((255, 222, 196), (248, 170, 146)),
    ((200, 232, 244), (128, 188, 222)),
    ((218, 240, 208), (146, 202, 168)),
    ((230, 220, 248), (176, 156, 220)),
    ((255, 240, 190), (250, 204, 118)),
    ((250, 220, 230), (228, 156, 184)),
    ((212, 220, 230), (146, 162, 186)),
    ((84, 116, 156), (38, 56, 90)),
)
DRAWING = ("soft", "flat", "outlined")
HAIRSTYLES = ("short", "bob", "long", "curly", "bun")
# Right half of the hairline, from the parting to the temple (x in half widths of the face, y in head units); "short" is combed to one side.
HAIRLINE = {
    "short": ((-0.92, -0.34), (-0.8, -0.5), (-0.4, -0.57), (0.1, -0.7), (0.44, -0.84), (0.6, -0.7), (0.86, -0.42), (1.0, -0.02)),
    "bob": ((0.0, -0.57), (0.4, -0.55), (0.78, -0.5), (0.9, -0.2), (0.98, 0.5)),
    "long": ((0.0, -0.86), (0.36, -0.68), (0.76, -0.45), (0.93, -0.15), (1.0, 0.4)),
    "curly": ((0.0, -0.62), (0.42, -0.54), (0.66, -0.56), (0.9, -0.4), (1.0, -0.06)),
    "bun": ((0.0, -0.75), (0.62, -0.66), (0.9, -0.4), (1.0, -0.06)),
}
# Outer edge of the hair in front: how far it reaches down (in half turns from the crown), its width and height, in those of the head.
CROWN = {
    "short": (0.5, 1.09, 1.17),
    "bob": (0.68, 1.1, 1.09),
    "long": (0.66, 1.08, 1.07),
    "curly": (0.5, 1.12, 1.11),
    "bun": (0.48, 1.04, 1.04),
}
# Right half of the hair behind the head, from crown to nape; "short" and "bun" have none.
CURL = np.linspace(0, np.pi, 23)[:-1]
BACK_HAIR = {
    "bob": ((0.0, -1.1), (0.75, -0.9), (1.12, -0.3), (1.2, 0.35), (1.08, 0.78), (0.6, 0.86)),
    "long": ((0.0, -1.1), (0.75, -0.9), (1.12, -0.3), (1.2, 0.5), (1.3, 1.3), (1.05, 1.7)),
    "curly": np.stack([1.3 * np.sin(CURL), -1.06 * np.cos(CURL)], 1) * (1 + 0.05 * np.cos(11 * CURL[:, None])) - (0, 0.34),
}


class Identity(NamedTuple):
    """Who is drawn. Sizes are factors around 1; colours are RGB, 0..255."""

    drawing: str
    hairstyle: str
    glasses: bool
    beard: bool
    skin: Colour
    hair: Colour
    iris: Colour
    clothes: Colour
    backdrop: tuple[Colour, Colour]  # top left, bottom right
    face_width: float
    jaw: float  # how much the face narrows towards the chin
    eye_size: float
    eye_distance: float
    nose_size: float
    mouth_size: float
    brow_size: float
    lip_red: float  # 0 skin .. 1 red


class Motion(NamedTuple):
    """What is done, per frame. One array per parameter."""

    x: Float32[np.ndarray, " F"]  # of the head, in sides of the frame, to the right
    y: Float32[np.ndarray, " F"]  # down
    roll: Float32[np.ndarray, " F"]  # radians, clockwise
    yaw: Float32[np.ndarray, " F"]  # radians, towards the image's right
    pitch: Float32[np.ndarray, " F"]  # radians, downwards
    gaze_x: Float32[np.ndarray, " F"]  # -1..1
    gaze_y: Float32[np.ndarray, " F"]  # -1..1
    blink: Float32[np.ndarray, " F"]  # 0 open .. 1 closed
    brow: Float32[np.ndarray, " F"]  # -1 lowered .. 1 raised
    mouth_open: Float32[np.ndarray, " F"]  # 0 closed .. 1 wide open
    mouth_width: Float32[np.ndarray, " F"]  # -1 pursed .. 1 wide
    smile: Float32[np.ndarray, " F"]  # -1 sad .. 1 happy


class Shape(NamedTuple):
    """A filled polygon per frame, in the frame's unit square; its shades are painted softly, and only within it."""

    points: Float[np.ndarray, "F n 2"]
    colour: Colour
    shades: tuple[Shape, ...] = ()


def split_seed(split: Split, index: int, kind: Literal["identity", "motion"]) -> int:
    """The seed of the `index`-th identity or motion of a split. No seed belongs to two splits or kinds."""
    splits, kinds = ("train", "validation", "test"), ("identity", "motion")
    if split not in splits or kind not in kinds:
        raise ValueError(f"split={split!r}, kind={kind!r}: use one of {splits} and one of {kinds}")
    if not 0 <= index < 2**40:
        raise ValueError(f"index={index} must be at least 0 and less than 2**40")
    return (splits.index(split) * len(kinds) + kinds.index(kind)) * 2**40 + index


def identity(seed: int) -> Identity:
    """A person, drawn from a few palettes and styles; the proportions of the face vary by at most 8%."""
    rng = np.random.default_rng([seed, 1])

    def pick(palette):
        return palette[rng.integers(len(palette))]

    def factor(spread):
        return float(rng.uniform(1 - spread, 1 + spread))

    def shade(palette):
        return tuple(float(c) for c in np.clip(np.array(pick(palette)) * factor(0.06), 0, 255))

    hairstyle = pick(HAIRSTYLES)
    return Identity(
        drawing=pick(DRAWING),
        hairstyle=hairstyle,
        glasses=bool(rng.random() < 0.2),
        beard=bool(rng.random() < (0.45 if hairstyle == "short" else 0.06)),
        skin=shade(SKIN),
        hair=shade(HAIR),
        iris=shade(IRIS),
        clothes=shade(CLOTHES),
        backdrop=pick(BACKDROP),
        face_width=factor(0.06),
        jaw=float(rng.uniform(0.08, 0.25)),
        eye_size=factor(0.05),
        eye_distance=factor(0.04),
        nose_size=factor(0.08),
        mouth_size=factor(0.08),
        brow_size=factor(0.3),
        lip_red=float(rng.uniform(0.25, 0.85)),
    )


def motion(seed: int, frames: int, *, fps: float = 25.0) -> Motion:
    """A smooth, lively motion: a function of time, so that more frames of the same seed begin with the same ones."""
    rng = np.random.default_rng([seed, 2])
    t = np.arange(frames) / fps

    def wander(low, high, gain=1.0):
        """Three sinusoids of low..high hertz, bounded by -1..1."""
        frequency, phase, amplitude = rng.uniform(low, high, 3), rng.uniform(0, 2 * np.pi, 3), rng.uniform(0.5, 1.0, 3)
        return np.tanh(gain * amplitude @ np.sin(2 * np.pi * frequency[:, None] * t + phase[:, None]))

    x, y, roll, yaw, pitch = (limit * wander(0.25, 0.6, 0.5) for limit in (0.09, 0.06, *np.radians([12, 25, 15])))
    gaze_x, gaze_y = wander(0.3, 0.9), wander(0.3, 0.9)
    brow, mouth_width, smile = wander(0.3, 0.8, 0.8), wander(0.4, 1.0, 0.8), wander(0.2, 0.5)
    mouth_open = 0.5 + 0.5 * np.tanh(1.7 * np.sin(2 * np.pi * (rng.uniform(1.5, 2.0) * t + rng.random()) + 0.9 * wander(0.3, 0.8)) - 0.2)
    blink, at = np.zeros(frames), rng.uniform(0, 2)
    while at < frames / fps:
        blink = np.maximum(blink, np.cos(np.pi / 2 * np.clip((t - at) / 0.12, -1, 1)) ** 2)  # 0.24 s
        at += rng.uniform(1.4, 2.6)
    fields = x, y, roll, yaw, pitch, gaze_x, gaze_y, blink, brow, (mouth_open - 0.02).clip(0), mouth_width, smile
    return Motion(*(np.asarray(field, np.float32) for field in fields))


def render_clip(
    person: Identity,
    motion: Motion,
    *,
    size: int,
) -> tuple[UInt8[np.ndarray, "F {size} {size} 3"], Float32[np.ndarray, "F 68 2"]]:
    """RGB frames of `person` in `motion`, and their landmarks in pixels (pixel centres at integers)."""
    if size < 16:
        raise ValueError(f"size={size} is too small to draw a face; use at least 16 pixels")
    shapes, landmarks = _portrait(person, motion)
    softness = {"soft": 2.6, "flat": 0.7, "outlined": 1.4}[person.drawing]
    side = size * max(SUPERSAMPLING, -(-LEAST_CANVAS // size))
    frames = _rasterise(shapes, _backdrop(person, side), size, softness)
    return frames, (landmarks * size - 0.5).astype(np.float32)


def pair(split: Split, index: int, *, frames: int, size: int) -> clips.Clip:
    """The `index`-th pair of a split: two people of their own in the same motion, at 25 frames per second."""
    moves = motion(split_seed(split, index, "motion"), frames)
    target, target_landmarks = render_clip(identity(split_seed(split, 2 * index, "identity")), moves, size=size)
    driver, driver_landmarks = render_clip(identity(split_seed(split, 2 * index + 1, "identity")), moves, size=size)
    return clips.Clip(f"{split}-{index:06d}", 25.0, target, driver, target_landmarks, driver_landmarks)


# ---------------------------------------------------------------------------------------------------------------- geometry


def _project(points: Points, motion: Motion) -> Points:
    """Head units [F or 1, n, 3] to the unit square of the frame [F, n, 2], turned by the motion's pose."""
    x, y, z = np.moveaxis(points, -1, 0)
    roll, yaw, pitch = motion.roll[:, None], motion.yaw[:, None], motion.pitch[:, None]
    x, z = x * np.cos(yaw) + z * np.sin(yaw), z * np.cos(yaw) - x * np.sin(yaw)
    y = y * np.cos(pitch) + z * np.sin(pitch) - 0.5  # the head leans about a point below its middle
    x, y = x * np.cos(roll) - y * np.sin(roll), x * np.sin(roll) + y * np.cos(roll) + 0.5
    return np.stack([HEAD_CENTRE[0] + motion.x[:, None] + HEAD_UNIT * x, HEAD_CENTRE[1] + motion.y[:, None] + HEAD_UNIT * y], -1)


def _at_depth(points: Points, depth: float) -> Points:
    """Adds z=depth: flat things, like the outline of the head."""
    return np.concatenate([points, np.full((*points.shape[:-1], 1), depth)], -1)


def _on_face(points: Points, lift: float | np.ndarray = 0.0) -> Points:
    """Adds the z of the face's curved front, plus `lift`."""
    x, y = points[..., 0], points[..., 1]
    return np.stack([x, y, 0.62 - 0.4 * x**2 - 0.16 * y**2 + lift], -1)


def _xy(x, y) -> Points:
    """Points [F or 1, n, 2] from coordinates that broadcast against each other."""
    return np.stack(np.broadcast_arrays(np.atleast_2d(x), np.atleast_2d(y)), -1)


def _ellipse(x, y, rx, ry, count: int = 24) -> Points:
    angle = np.arange(count) * 2 * np.pi / count
    return _xy(x + rx * np.cos(angle), y + ry * np.sin(angle))


def _between(x, top, bottom) -> Points:
    """The polygon between two curves over the same x [F or 1, n]."""
    there, back = _xy(x, top), _xy(x, bottom)
    there, back = np.broadcast_arrays(there, back)
    return np.concatenate([there, back[:, ::-1]], 1)


def _ribbon(points: Points, width) -> Points:
    """The polygon of a line of the given width ([n], or a number) along open points [F, n, 2]."""
    normal = np.gradient(points, axis=1)[..., ::-1] * (-1, 1)
    normal *= np.asarray(width)[..., None] / 2 / (np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-9)
    return np.concatenate([points + normal, (points - normal)[:, ::-1]], 1)


def _grown(points: Points, width: float) -> Points:
    """A closed polygon [F, n, 2] moved outwards by `width`."""
    tangent = np.roll(points, -1, 1) - np.roll(points, 1, 1)
    normal = tangent[..., ::-1] * (1, -1)
    area = (points[..., 0] * np.roll(points[..., 1], -1, 1) - points[..., 1] * np.roll(points[..., 0], -1, 1)).sum(1)
    return points + width * np.sign(area)[:, None, None] * normal / (np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-9)


def _curve(control, *, closed: bool, steps: int = 5) -> Points:
    """A Catmull-Rom curve [1, n, 2] through control points [k, 2]."""
    p = np.asarray(control, float)
    p = np.concatenate([p[-1:], p, p[:2]] if closed else [p[:1], p, p[-1:]])
    t = (np.arange(steps) / steps)[:, None, None]
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))  # [steps, k, 2]
    return np.concatenate([curve.transpose(1, 0, 2).reshape(-1, 2), p[-2:-1]][: 1 if closed else 2])[None]


def _mix(a: Colour, b: Colour, amount: float) -> Colour:
    return tuple(float(p + (q - p) * amount) for p, q in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------------------------------------- the portrait


class _Sketch:
    """One person in one motion: the shapes drawn so far, and the ways to bring points in head units to the frame."""

    def __init__(self, who: Identity, motion: Motion):
        self.who, self.motion, self.shapes = who, motion, []
        # The body follows the head only a little, and does not turn.
        self.body = motion._replace(**dict.fromkeys(("roll", "yaw", "pitch"), 0 * motion.x), x=0.3 * motion.x, y=0.3 * motion.y)
        self.width = 0.86 * who.face_width  # half the face
        self.shadow = _mix(who.skin, (120, 40, 50), 0.26)
        self.dark_hair = _mix(who.hair, (20, 10, 25), 0.35)

    def flat(self, points: Points, depth: float) -> Points:
        """Points of the head at one depth, like its outline."""
        return _project(_at_depth(points, depth), self.motion)

    def front(self, points: Points, lift: float | np.ndarray = 0.0) -> Points:
        """Points on the face, or `lift` before it."""
        return _project(_on_face(points, lift), self.motion)

    def trunk(self, points: Points) -> Points:
        """Points of the body."""
        return _project(_at_depth(points, 0.0), self.body)

    def outline(self, angles: np.ndarray, scale: float = 1.0) -> Points:
        """The outline of the head in head units: angle 0 is the crown, pi the chin, which sinks as the mouth opens."""
        y = -np.cos(angles) * scale
        x = self.width * scale * np.sin(angles) * (1 - self.who.jaw * np.maximum(y, 0) ** 1.6)
        return _xy(x, y + 0.09 * self.motion.mouth_open[:, None] * np.clip((y - 0.2) / 0.8, 0, 1))

    def add(self, points: Points, colour: Colour, *shades: tuple[Points, Colour], line: bool = False) -> None:
        """Puts a shape in front of all others; `line` says that the outlined drawing style gives it a dark rim."""
        if line and self.who.drawing == "outlined":
            self.shapes.append(Shape(_grown(points, 0.008), _mix(colour, (36, 22, 40), 0.72)))
        self.shapes.append(Shape(points, colour, tuple(Shape(*shade) for shade in shades)))


def _portrait(who: Identity, motion: Motion) -> tuple[list[Shape], Float[np.ndarray, "F 68 2"]]:
    """All shapes from back to front, and the landmarks, in the unit square of the frame."""
    sketch = _Sketch(who, motion)
    _draw_back_hair(sketch)
    _draw_body(sketch)
    _draw_head(sketch)
    lips = _draw_mouth(sketch)
    _draw_nose(sketch)
    lids = _draw_eyes(sketch)
    _draw_hair(sketch)
    brows = _draw_brows(sketch)
    if who.glasses:
        _draw_glasses(sketch)
    return sketch.shapes, _landmarks(sketch, brows, lids, lips)


def _draw_back_hair(sketch: _Sketch) -> None:
    who = sketch.who
    if who.hairstyle in BACK_HAIR:
        right = np.array(BACK_HAIR[who.hairstyle]) * (sketch.width, 1)
        hair = _curve(np.concatenate([right, right[:0:-1] * (-1, 1)]), closed=True)
        sketch.add(sketch.flat(hair, -0.3), who.hair if who.hairstyle == "curly" else sketch.dark_hair, line=True)
    if who.hairstyle == "bun":
        shine = sketch.flat(_ellipse(-0.08, -1.3, 0.16, 0.1), -0.1)
        sketch.add(sketch.flat(_ellipse(0.0, -1.2, 0.36, 0.32), -0.1), who.hair, (shine, _mix(who.hair, LIGHT, 0.22)), line=True)


def _draw_body(sketch: _Sketch) -> None:
    who = sketch.who
    nape = sketch.flat(_xy([-0.34, 0.34], 0.55), -0.1)
    neck = np.concatenate([nape, sketch.trunk(_xy([0.38, 0.6, -0.6, -0.38], [1.25, 1.8, 1.8, 1.25]))], 1)
    sketch.add(neck, who.skin, (sketch.flat(_ellipse(0.0, 0.9, 0.62, 0.42), 0.0), sketch.shadow))
    neckline = _curve([(0.5, 1.17), (0.36, 1.4), (0.0, 1.52), (-0.36, 1.4), (-0.5, 1.17)], closed=False)
    left = _curve([(-0.5, 1.17), (-1.0, 1.34), (-1.42, 1.6), (-1.62, 2.6)], closed=False)
    clothes = np.concatenate([neckline, left, left[:, ::-1] * (-1, 1)], 1)
    fold = _mix(who.clothes, (30, 20, 50), 0.28)
    sleeve = sketch.trunk(_ellipse(1.25, 2.1, 0.5, 0.7)), fold
    shoulder = sketch.trunk(_ellipse(-0.8, 1.62, 0.4, 0.14)), _mix(who.clothes, LIGHT, 0.2)
    sketch.add(sketch.trunk(clothes), who.clothes, sleeve, shoulder, line=True)
    sketch.add(_ribbon(sketch.trunk(neckline), 0.024), fold)


def _draw_head(sketch: _Sketch) -> None:
    who, width, shadow = sketch.who, sketch.width, sketch.shadow
    for side in (-1, 1):  # behind the face, which hides the ear it turns to
        shell = sketch.flat(_ellipse(side * width * 1.04, 0.02, 0.07, 0.13), -0.22)
        sketch.add(sketch.flat(_ellipse(side * width * 1.02, 0.0, 0.15, 0.24), -0.22), who.skin, (shell, shadow), line=True)
    lit = sketch.flat(sketch.outline(np.arange(32) * 2 * np.pi / 32, 0.92) - (0.07, 0.05), 0.28), who.skin
    blush = _mix(who.skin, (240, 84, 88), 0.36)
    cheeks = [(sketch.front(_ellipse(side * 0.56 * who.face_width, 0.34, 0.2, 0.14)), blush) for side in (-1, 1)]
    forehead = sketch.front(_ellipse(-0.1, -0.5, 0.42, 0.16)), _mix(who.skin, LIGHT, 0.35)
    under_fringe = sketch.front(_ellipse(0.0, -0.86, 0.9, 0.26)), shadow
    face = sketch.flat(sketch.outline(np.arange(56) * 2 * np.pi / 56), OUTLINE_DEPTH)
    sketch.add(face, _mix(who.skin, shadow, 0.55), lit, *cheeks, forehead, under_fringe, line=True)
    if who.beard:
        cheek_line = [(-0.8, 0.16), (-0.68, 0.38), (-0.42, 0.42), (0.0, 0.37), (0.42, 0.42), (0.68, 0.38), (0.8, 0.16)]
        upper = sketch.front(_curve(cheek_line, closed=False) * (who.face_width, 1))
        jaw = sketch.flat(sketch.outline(np.linspace(0.56 * np.pi, 1.44 * np.pi, 33)), OUTLINE_DEPTH)
        moustache = sketch.front(_ellipse(0.0, 0.56, 0.6, 0.12)), _mix(who.hair, who.skin, 0.22)
        sketch.add(np.concatenate([jaw, upper], 1), _mix(who.hair, who.skin, 0.12), moustache)


def _draw_mouth(sketch: _Sketch) -> list[Points]:
    """Returns the outer and inner edges of the lips in the frame: outer top, outer bottom, inner top, inner bottom, [F, 17, 2] each."""
    who, move = sketch.who, sketch.motion
    bulge, opening = np.sqrt(1 - U**2), move.mouth_open[:, None]
    x = U * (0.43 * who.mouth_size * (1 + 0.13 * move.mouth_width - 0.08 * move.mouth_open))[:, None]
    middle = 0.53 + (0.035 + 0.045 * move.smile[:, None]) * (1 - 2.2 * U**2)
    top, bottom = middle - 0.09 * opening * bulge, middle + 0.33 * opening * bulge
    outer_top = top - 0.075 * bulge * (1 - 0.3 * np.exp(-((U / 0.2) ** 2)))
    outer_bottom = bottom + 0.095 * bulge
    lips = _mix(_mix(who.skin, (150, 60, 60), 0.35), (206, 52, 74), who.lip_red)
    sketch.add(sketch.front(_between(x, outer_top, outer_bottom)), lips)
    sketch.add(sketch.front(_between(x, top, bottom)), MOUTH_INSIDE)
    sketch.add(sketch.front(_between(0.93 * x, bottom - 0.32 * bulge * (bottom - top), bottom)), TONGUE)
    sketch.add(sketch.front(_between(0.93 * x, top, top + 0.2 * (bottom - top))), TEETH)
    return [sketch.front(_xy(x, curve)) for curve in (outer_top, outer_bottom, top, bottom)]


def _draw_nose(sketch: _Sketch) -> None:
    skin, size = sketch.who.skin, sketch.who.nose_size
    for x, y, rx, ry, lift, colour in (
        (0.0, 0.25, 0.14, 0.1, 0.2, _mix(skin, sketch.shadow, 0.75)),
        (-0.01, 0.225, 0.115, 0.085, 0.21, _mix(skin, (250, 120, 100), 0.16)),
        (-0.03, 0.2, 0.045, 0.03, 0.23, _mix(skin, LIGHT, 0.6)),
    ):
        sketch.add(sketch.front(_ellipse(x, y, rx * size, ry * size), lift), colour)


def _draw_eyes(sketch: _Sketch) -> list[Points]:
    """Returns the lids' edges in the frame: upper and lower of the eye on the image's left, then of the other, [F, 17, 2] each."""
    who, move, lids = sketch.who, sketch.motion, []
    reach, height = 0.34 * who.eye_size, 0.26 * who.eye_size
    closed = EYE_Y + 0.62 * height * (1 - U**2)
    open_top, open_bottom = EYE_Y - height * (1 - U**2) ** 0.62, EYE_Y + 0.84 * height * (1 - U**2) ** 0.7
    top, bottom = (curve + (closed - curve) * move.blink[:, None] for curve in (open_top, open_bottom))
    lid_shadow = np.minimum(top + 0.09 * np.sqrt(1 - U**2), bottom)
    for side in (-1, 1):
        centre = side * EYE_X * who.eye_distance
        x = centre + reach * U
        sketch.add(sketch.front(_between(x, np.minimum(open_top - 0.05, top), top)), _mix(who.skin, sketch.shadow, 0.6))
        sketch.add(sketch.front(_between(x, top, bottom)), EYE_WHITE)
        sketch.add(sketch.front(_between(x, top, lid_shadow)), EYE_SHADE)
        for dx, dy, radius, colour in (
            (0.0, 0.0, 0.205, _mix(who.iris, (16, 12, 24), 0.5)),
            (0.0, 0.02, 0.17, who.iris),
            (0.0, 0.0, 0.1, PUPIL),
            (-0.075, -0.085, 0.06, EYE_WHITE),
            (0.075, 0.08, 0.03, _mix(who.iris, LIGHT, 0.6)),
        ):
            # A disc, cut off where the lids are.
            across = dx + 0.13 * move.gaze_x[:, None] + radius * DISC
            ceiling, floor = (_height_of(curve, across / reach) for curve in (top, bottom))
            level, arc = EYE_Y + dy + 0.07 * move.gaze_y[:, None], radius * np.sqrt(1 - DISC**2)
            disc = _between(centre + across, (level - arc).clip(ceiling, floor), (level + arc).clip(ceiling, floor))
            sketch.add(sketch.front(disc), colour)
        lash = sketch.front(_xy(centre + side * 0.01 + 1.04 * reach * U, top))
        sketch.add(_ribbon(lash, 0.021 * np.linspace(1.0, 0.45, 17)[::-side]), (48, 32, 40))
        lids += [sketch.front(_xy(x, top)), sketch.front(_xy(x, bottom))]
    return lids


def _draw_hair(sketch: _Sketch) -> None:
    who = sketch.who
    reach, breadth, height = CROWN[who.hairstyle]
    arc = np.linspace(-reach, reach, 29) * np.pi
    crown = sketch.flat(_xy(breadth * sketch.width * np.sin(arc), -height * np.cos(arc)), 0.14)
    right = np.array(HAIRLINE[who.hairstyle]) * (sketch.width, 1)
    left = right[-1:] if who.hairstyle == "short" else right[:0:-1]
    hairline = sketch.front(_curve(np.concatenate([left * (-1, 1), right]), closed=False), 0.06)
    shine = sketch.flat(_ellipse(-0.26, -0.86, 0.42, 0.1), 0.4), _mix(who.hair, LIGHT, 0.22)
    sketch.add(np.concatenate([crown, hairline[:, ::-1]], 1), who.hair, shine, line=True)


def _draw_brows(sketch: _Sketch) -> list[Points]:
    """Above the hair, so that a fringe does not hide them. Returns their middle lines in the frame, [F, 17, 2] each."""
    who, lines = sketch.who, []
    for side in (-1, 1):
        y = -0.55 - 0.06 * (1 - U**2) - 0.08 * sketch.motion.brow[:, None] + 0.05 * side * U
        lines.append(sketch.front(_xy(side * EYE_X * who.eye_distance + 0.28 * U, y), 0.04))
        thickness = 0.026 * who.brow_size * np.linspace(0.55, 1.0, 17)[::-side]
        sketch.add(_ribbon(lines[-1], thickness), _mix(sketch.dark_hair, (60, 40, 40), 0.3))
    return lines


def _draw_glasses(sketch: _Sketch) -> None:
    frame = (52, 44, 60)
    for side in (-1, 1):
        ring = _ellipse(side * EYE_X * sketch.who.eye_distance, -0.08, 0.4, 0.36, 33)
        sketch.add(_ribbon(sketch.front(ring[:, [*range(33), 0]], 0.1), 0.014), frame)
    sketch.add(_ribbon(sketch.front(_xy(np.linspace(-0.04, 0.04, 5), -0.14), 0.1), 0.016), frame)


def _height_of(curve: Points, at: Points) -> Points:
    """y [F, m] of a `curve` [F, 17] over U, at the places `at` [F, m]; beyond an end it is the end's."""
    place = (at.clip(-1, 1) + 1) / 2 * (U.size - 1)
    left = place.astype(int).clip(0, U.size - 2)
    low, high = np.take_along_axis(curve, left, 1), np.take_along_axis(curve, left + 1, 1)
    return low + (high - low) * (place - left)


def _landmarks(sketch: _Sketch, brows: list[Points], lids: list[Points], lips: list[Points]) -> Float[np.ndarray, "F 68 2"]:
    """The 68 iBUG points in their order, each on the drawn geometry. Curves have 17 samples from left to right."""
    jaw = sketch.flat(sketch.outline(np.linspace(1.53 * np.pi, 0.47 * np.pi, 17)), OUTLINE_DEPTH)
    bridge = sketch.front(_xy(0.0, np.linspace(-0.12, 0.22, 4)), np.linspace(0.05, 0.22, 4))
    across, down = np.array([-0.9, -0.5, 0.0, 0.5, 0.9]), np.array([0.4, 0.85, 1.0, 0.85, 0.4])
    nostrils = sketch.front(_xy(0.14 * sketch.who.nose_size * across, 0.25 + 0.1 * sketch.who.nose_size * down), 0.2)
    eyes = [points for top, bottom in (lids[:2], lids[2:]) for points in (top[:, [0, 5, 11, 16]], bottom[:, [11, 5]])]
    outer_top, outer_bottom, top, bottom = lips
    mouth = [outer_top[:, [0, 3, 6, 8, 10, 13, 16]], outer_bottom[:, [13, 10, 8, 6, 3]], top[:, [0, 4, 8, 12, 16]], bottom[:, [12, 8, 4]]]
    return np.concatenate([jaw, *(brow[:, ::4] for brow in brows), bridge, nostrils, *eyes, *mouth], 1)


# ---------------------------------------------------------------------------------------------------------------- drawing


def _backdrop(who: Identity, side: int) -> UInt8[np.ndarray, "side side 3"]:
    ramp = (np.arange(side) + 0.5) / side
    amount = 0.3 * ramp[None, :, None] + 0.7 * ramp[:, None, None]
    return (np.array(who.backdrop[0]) * (1 - amount) + np.array(who.backdrop[1]) * amount).astype(np.uint8)


def _rasterise(
    shapes: list[Shape],
    backdrop: UInt8[np.ndarray, "side side 3"],
    size: int,
    softness: float,
) -> UInt8[np.ndarray, "F size size 3"]:
    """Draws every frame as large as the backdrop, with anti-aliased edges, and shrinks it."""
    side, shift = len(backdrop), 6

    def fixed_point(shape, scale):
        # Anti-aliasing lets a polygon spill over its edge; drawn that much smaller it has its true size at any resolution.
        points = _grown(shape.points, -SPILL / scale)
        return np.round((points * scale - 0.5) * 2**shift).astype(np.int32)

    def shades_of(shape):
        return [(fixed_point(shade, SHADE_GRID), shade.colour) for shade in shape.shades]

    polygons = [(fixed_point(shape, side), shape.colour, shades_of(shape)) for shape in shapes]
    frames = np.empty((len(shapes[0].points), size, size, 3), np.uint8)
    small, mask = np.empty((SHADE_GRID, SHADE_GRID, 3), np.uint8), np.empty((side, side), np.uint8)
    for index, frame in enumerate(frames):
        canvas = backdrop.copy()
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


# ---------------------------------------------------------------------------------------------------------------- program


class _Shard(NamedTuple):
    """One file to write, all that a worker process needs to know."""

    directory: pathlib.Path
    split: Split
    shard: int
    shards: int
    indices: range
    frames: int
    size: int


def _write_shard(job: _Shard) -> int:
    """Renders and writes one shard; returns its number of pairs."""
    cv2.setNumThreads(1)  # there is a process per core already
    pairs = (pair(job.split, index, frames=job.frames, size=job.size) for index in job.indices)
    clips.write_clips(pairs, job.directory, split=job.split, shard=job.shard, shards=job.shards)
    return len(job.indices)


def _settle(directory: pathlib.Path, settings: dict[str, int]) -> None:
    """Shards of an interrupted run may only be joined by shards of the same settings."""
    record = directory / "synthetic.json"
    if record.exists() and (before := json.loads(record.read_text())) != settings:
        changed = ", ".join(f"--{name.replace('_', '-')} {before.get(name)}" for name in settings if before.get(name) != settings[name])
        raise ConfigError(f"{directory} was begun with {changed}; use the same, or another --output")
    directory.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m svdp_jax.data.synthetic",
        description="Write a dataset of rendered portraits: pairs of people in the same motion, 25 frames per second.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=pathlib.Path, required=True, default=argparse.SUPPRESS, help="directory of the dataset; shards already there are kept")
    parser.add_argument("--pairs", type=int, required=True, default=argparse.SUPPRESS, help="pairs for training, each of two new people")
    parser.add_argument("--validation-pairs", type=int, default=32, help="pairs for validation, of other people and motions")
    parser.add_argument("--frames", type=int, default=24, help="frames per clip")
    parser.add_argument("--size", type=int, default=128, help="pixels, height and width of a frame")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other people and motions")
    flags = parser.parse_args(arguments)
    limits = {
        "pairs": (1, SEED_STRIDE),
        "validation_pairs": (0, SEED_STRIDE),
        "frames": (1, 10_000),
        "size": (16, 2048),
        "seed": (0, 10_000),
    }
    for name, (least, most) in limits.items():
        if not least <= getattr(flags, name) <= most:
            parser.error(f"--{name.replace('_', '-')} {getattr(flags, name)} must be {least} to {most}")

    first, jobs = flags.seed * SEED_STRIDE, []
    for split, count in ("train", flags.pairs), ("validation", flags.validation_pairs):
        shards = -(-count // PAIRS_PER_SHARD)
        for shard in range(shards):
            indices = range(first + shard * count // shards, first + (shard + 1) * count // shards)
            jobs.append(_Shard(flags.output, split, shard, shards, indices, flags.frames, flags.size))
    try:
        _settle(flags.output, {name: getattr(flags, name) for name in limits})
        missing = [job for job in jobs if not clips.shard_path(job.directory, split=job.split, shard=job.shard, shards=job.shards).exists()]
        total = flags.pairs + flags.validation_pairs
        done = total - sum(len(job.indices) for job in missing)
        with multiprocessing.get_context("spawn").Pool() as pool, tqdm(total=total, initial=done, unit="pair") as bar:
            for count in pool.imap_unordered(_write_shard, missing):
                bar.update(count)
        lengths = clips.finish(flags.output)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{flags.output}: " + ", ".join(f"{count} {split} pairs" for split, count in lengths.items()))


if __name__ == "__main__":
    main()
