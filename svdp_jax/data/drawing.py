"""How a head is drawn: a person in a motion becomes shapes, and landmarks that are points of the same geometry, not estimates.

In: an `Identity` and a `Motion` of F frames. Out: shapes from back to front and the 68 iBUG landmarks [F, 68, 2], both in the frame's
unit square. Geometry lives in head units: origin in the middle of the head, x right, y down, z towards the viewer, crown at y=-1,
chin at y=+1; `_project` turns it by the motion's pose and brings it to the frame. All frames are computed at once, [F, n, 3].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8

from svdp_jax.data.polygons import Colour, Points, Shape, between, catmull_rom, ellipse, mix, offset, stroke, xy

HEAD_UNIT = 0.29  # half a head's height, in sides of the frame
HEAD_CENTRE = 0.5, 0.475  # of the frame, at rest
OUTLINE_DEPTH = 0.2  # of the head's outline, in head units
EYE_X, EYE_Y = 0.41, -0.1  # of an eye's middle
U = np.linspace(-1, 1, 17)[None]  # where lids, lips and brows are sampled, from their left end to their right
DISC = np.sin(np.linspace(-np.pi / 2, np.pi / 2, 15))[None]  # where discs are

MOUTH_INSIDE = (112, 18, 34)  # the same for everyone: the mouth's opening is then easy to read
TONGUE, TEETH = (206, 84, 92), (250, 246, 240)
LIGHT, EYE_WHITE, EYE_SHADE, PUPIL = (255, 250, 240), (252, 250, 247), (218, 216, 228), (24, 20, 26)

PAPER = (250, 245, 236)
LUMA = (0.299, 0.587, 0.114)

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


class Style(NamedTuple):
    """How portraits are drawn."""

    softness: float  # blur of the shades, in pixels of their grid
    rim: float = 0.0  # width of dark edges, in sides of the frame
    grey: bool = False
    paper: float = 0.0  # 0 opaque .. 1 nothing but paper

    def tone(self, colours: UInt8[np.ndarray, "*shape 3"]) -> UInt8[np.ndarray, "*shape 3"]:
        """Colours as this style has them."""
        if not self.grey and not self.paper:
            return colours
        drawn = (colours @ np.array(LUMA))[..., None] if self.grey else colours
        return np.rint((1 - self.paper) * drawn + self.paper * np.array(PAPER)).astype(np.uint8)

    def untone(self, colours: UInt8[np.ndarray, "*shape 3"]) -> UInt8[np.ndarray, "*shape 3"]:
        """Without the paper; greys stay grey."""
        if not self.paper:
            return colours
        return np.rint(np.clip((colours - self.paper * np.array(PAPER)) / (1 - self.paper), 0, 255)).astype(np.uint8)

    @property
    def mouth_inside(self) -> Colour:
        """The colour of the inside of all mouths, without the paper."""
        return tuple(self.untone(self.tone(np.array(MOUTH_INSIDE, np.uint8))).tolist())


STYLES = {
    "soft": Style(2.6),
    "flat": Style(0.7),
    "outlined": Style(1.4, rim=0.008),
    "pastel": Style(2.0, paper=0.4),
    "pencil": Style(1.4, rim=0.006, grey=True, paper=0.2),
}
TRAINED = ("soft", "flat", "outlined")  # of the people that `synthetic.identity` draws; of the others a model can be asked what it makes of them


class Identity(NamedTuple):
    """Who is drawn. Sizes are factors around 1; colours are RGB, 0..255."""

    drawing: str  # a name in STYLES
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


class _Sketch:
    """One person in one motion: the shapes drawn so far, and the ways to bring points in head units to the frame."""

    def __init__(self, who: Identity, motion: Motion):
        self.who, self.motion, self.shapes = who, motion, []
        # The body follows the head only a little, and does not turn.
        self.body = motion._replace(**dict.fromkeys(("roll", "yaw", "pitch"), 0 * motion.x), x=0.3 * motion.x, y=0.3 * motion.y)
        self.width = 0.86 * who.face_width  # half the face
        self.shadow = mix(who.skin, (120, 40, 50), 0.26)
        self.dark_hair = mix(who.hair, (20, 10, 25), 0.35)

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
        return xy(x, y + 0.09 * self.motion.mouth_open[:, None] * np.clip((y - 0.2) / 0.8, 0, 1))

    def add(self, points: Points, colour: Colour, *shades: tuple[Points, Colour], line: bool = False) -> None:
        """Puts a shape in front of all others; `line` says that styles with rims give it one."""
        if line and (rim := STYLES[self.who.drawing].rim):
            self.shapes.append(Shape(offset(points, rim), mix(colour, (36, 22, 40), 0.72)))
        self.shapes.append(Shape(points, colour, tuple(Shape(*shade) for shade in shades)))


def portrait(who: Identity, motion: Motion) -> tuple[list[Shape], Float[np.ndarray, "F 68 2"]]:
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
        hair = catmull_rom(np.concatenate([right, right[:0:-1] * (-1, 1)]), closed=True)
        sketch.add(sketch.flat(hair, -0.3), who.hair if who.hairstyle == "curly" else sketch.dark_hair, line=True)
    if who.hairstyle == "bun":
        shine = sketch.flat(ellipse(-0.08, -1.3, 0.16, 0.1), -0.1)
        sketch.add(sketch.flat(ellipse(0.0, -1.2, 0.36, 0.32), -0.1), who.hair, (shine, mix(who.hair, LIGHT, 0.22)), line=True)


def _draw_body(sketch: _Sketch) -> None:
    who = sketch.who
    nape = sketch.flat(xy([-0.34, 0.34], 0.55), -0.1)
    neck = np.concatenate([nape, sketch.trunk(xy([0.38, 0.6, -0.6, -0.38], [1.25, 1.8, 1.8, 1.25]))], 1)
    sketch.add(neck, who.skin, (sketch.flat(ellipse(0.0, 0.9, 0.62, 0.42), 0.0), sketch.shadow))
    neckline = catmull_rom([(0.5, 1.17), (0.36, 1.4), (0.0, 1.52), (-0.36, 1.4), (-0.5, 1.17)], closed=False)
    left = catmull_rom([(-0.5, 1.17), (-1.0, 1.34), (-1.42, 1.6), (-1.62, 2.6)], closed=False)
    clothes = np.concatenate([neckline, left, left[:, ::-1] * (-1, 1)], 1)
    fold = mix(who.clothes, (30, 20, 50), 0.28)
    sleeve = sketch.trunk(ellipse(1.25, 2.1, 0.5, 0.7)), fold
    shoulder = sketch.trunk(ellipse(-0.8, 1.62, 0.4, 0.14)), mix(who.clothes, LIGHT, 0.2)
    sketch.add(sketch.trunk(clothes), who.clothes, sleeve, shoulder, line=True)
    sketch.add(stroke(sketch.trunk(neckline), 0.024), fold)


def _draw_head(sketch: _Sketch) -> None:
    who, width, shadow = sketch.who, sketch.width, sketch.shadow
    for side in (-1, 1):  # behind the face, which hides the ear it turns to
        shell = sketch.flat(ellipse(side * width * 1.04, 0.02, 0.07, 0.13), -0.22)
        sketch.add(sketch.flat(ellipse(side * width * 1.02, 0.0, 0.15, 0.24), -0.22), who.skin, (shell, shadow), line=True)
    lit = sketch.flat(sketch.outline(np.arange(32) * 2 * np.pi / 32, 0.92) - (0.07, 0.05), 0.28), who.skin
    blush = mix(who.skin, (240, 84, 88), 0.36)
    cheeks = [(sketch.front(ellipse(side * 0.56 * who.face_width, 0.34, 0.2, 0.14)), blush) for side in (-1, 1)]
    forehead = sketch.front(ellipse(-0.1, -0.5, 0.42, 0.16)), mix(who.skin, LIGHT, 0.35)
    under_fringe = sketch.front(ellipse(0.0, -0.86, 0.9, 0.26)), shadow
    face = sketch.flat(sketch.outline(np.arange(56) * 2 * np.pi / 56), OUTLINE_DEPTH)
    sketch.add(face, mix(who.skin, shadow, 0.55), lit, *cheeks, forehead, under_fringe, line=True)
    if who.beard:
        cheek_line = [(-0.8, 0.16), (-0.68, 0.38), (-0.42, 0.42), (0.0, 0.37), (0.42, 0.42), (0.68, 0.38), (0.8, 0.16)]
        upper = sketch.front(catmull_rom(cheek_line, closed=False) * (who.face_width, 1))
        jaw = sketch.flat(sketch.outline(np.linspace(0.56 * np.pi, 1.44 * np.pi, 33)), OUTLINE_DEPTH)
        moustache = sketch.front(ellipse(0.0, 0.56, 0.6, 0.12)), mix(who.hair, who.skin, 0.22)
        sketch.add(np.concatenate([jaw, upper], 1), mix(who.hair, who.skin, 0.12), moustache)


def _draw_mouth(sketch: _Sketch) -> list[Points]:
    """Returns the outer and inner edges of the lips in the frame: outer top, outer bottom, inner top, inner bottom, [F, 17, 2] each."""
    who, move = sketch.who, sketch.motion
    bulge, opening = np.sqrt(1 - U**2), move.mouth_open[:, None]
    x = U * (0.43 * who.mouth_size * (1 + 0.13 * move.mouth_width - 0.08 * move.mouth_open))[:, None]
    middle = 0.53 + (0.035 + 0.045 * move.smile[:, None]) * (1 - 2.2 * U**2)
    top, bottom = middle - 0.09 * opening * bulge, middle + 0.33 * opening * bulge
    outer_top = top - 0.075 * bulge * (1 - 0.3 * np.exp(-((U / 0.2) ** 2)))
    outer_bottom = bottom + 0.095 * bulge
    lips = mix(mix(who.skin, (150, 60, 60), 0.35), (206, 52, 74), who.lip_red)
    sketch.add(sketch.front(between(x, outer_top, outer_bottom)), lips)
    sketch.add(sketch.front(between(x, top, bottom)), MOUTH_INSIDE)
    sketch.add(sketch.front(between(0.93 * x, bottom - 0.32 * bulge * (bottom - top), bottom)), TONGUE)
    sketch.add(sketch.front(between(0.93 * x, top, top + 0.2 * (bottom - top))), TEETH)
    return [sketch.front(xy(x, curve)) for curve in (outer_top, outer_bottom, top, bottom)]


def _draw_nose(sketch: _Sketch) -> None:
    skin, size = sketch.who.skin, sketch.who.nose_size
    for x, y, rx, ry, lift, colour in (
        (0.0, 0.25, 0.14, 0.1, 0.2, mix(skin, sketch.shadow, 0.75)),
        (-0.01, 0.225, 0.115, 0.085, 0.21, mix(skin, (250, 120, 100), 0.16)),
        (-0.03, 0.2, 0.045, 0.03, 0.23, mix(skin, LIGHT, 0.6)),
    ):
        sketch.add(sketch.front(ellipse(x, y, rx * size, ry * size), lift), colour)


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
        sketch.add(sketch.front(between(x, np.minimum(open_top - 0.05, top), top)), mix(who.skin, sketch.shadow, 0.6))
        sketch.add(sketch.front(between(x, top, bottom)), EYE_WHITE)
        sketch.add(sketch.front(between(x, top, lid_shadow)), EYE_SHADE)
        for dx, dy, radius, colour in (
            (0.0, 0.0, 0.205, mix(who.iris, (16, 12, 24), 0.5)),
            (0.0, 0.02, 0.17, who.iris),
            (0.0, 0.0, 0.1, PUPIL),
            (-0.075, -0.085, 0.06, EYE_WHITE),
            (0.075, 0.08, 0.03, mix(who.iris, LIGHT, 0.6)),
        ):
            # A disc, cut off where the lids are.
            across = dx + 0.13 * move.gaze_x[:, None] + radius * DISC
            ceiling, floor = (_height_of(curve, across / reach) for curve in (top, bottom))
            level, arc = EYE_Y + dy + 0.07 * move.gaze_y[:, None], radius * np.sqrt(1 - DISC**2)
            disc = between(centre + across, (level - arc).clip(ceiling, floor), (level + arc).clip(ceiling, floor))
            sketch.add(sketch.front(disc), colour)
        lash = sketch.front(xy(centre + side * 0.01 + 1.04 * reach * U, top))
        sketch.add(stroke(lash, 0.021 * np.linspace(1.0, 0.45, 17)[::-side]), (48, 32, 40))
        lids += [sketch.front(xy(x, top)), sketch.front(xy(x, bottom))]
    return lids


def _draw_hair(sketch: _Sketch) -> None:
    who = sketch.who
    reach, breadth, height = CROWN[who.hairstyle]
    arc = np.linspace(-reach, reach, 29) * np.pi
    crown = sketch.flat(xy(breadth * sketch.width * np.sin(arc), -height * np.cos(arc)), 0.14)
    right = np.array(HAIRLINE[who.hairstyle]) * (sketch.width, 1)
    left = right[-1:] if who.hairstyle == "short" else right[:0:-1]
    hairline = sketch.front(catmull_rom(np.concatenate([left * (-1, 1), right]), closed=False), 0.06)
    shine = sketch.flat(ellipse(-0.26, -0.86, 0.42, 0.1), 0.4), mix(who.hair, LIGHT, 0.22)
    sketch.add(np.concatenate([crown, hairline[:, ::-1]], 1), who.hair, shine, line=True)


def _draw_brows(sketch: _Sketch) -> list[Points]:
    """Above the hair, so that a fringe does not hide them. Returns their middle lines in the frame, [F, 17, 2] each."""
    who, lines = sketch.who, []
    for side in (-1, 1):
        y = -0.55 - 0.06 * (1 - U**2) - 0.08 * sketch.motion.brow[:, None] + 0.05 * side * U
        lines.append(sketch.front(xy(side * EYE_X * who.eye_distance + 0.28 * U, y), 0.04))
        thickness = 0.026 * who.brow_size * np.linspace(0.55, 1.0, 17)[::-side]
        sketch.add(stroke(lines[-1], thickness), mix(sketch.dark_hair, (60, 40, 40), 0.3))
    return lines


def _draw_glasses(sketch: _Sketch) -> None:
    frame = (52, 44, 60)
    for side in (-1, 1):
        ring = ellipse(side * EYE_X * sketch.who.eye_distance, -0.08, 0.4, 0.36, 33)
        sketch.add(stroke(sketch.front(ring[:, [*range(33), 0]], 0.1), 0.014), frame)
    sketch.add(stroke(sketch.front(xy(np.linspace(-0.04, 0.04, 5), -0.14), 0.1), 0.016), frame)


def _height_of(curve: Points, at: Points) -> Points:
    """y [F, m] of a `curve` [F, 17] over U, at the places `at` [F, m]; beyond an end it is the end's."""
    place = (at.clip(-1, 1) + 1) / 2 * (U.size - 1)
    left = place.astype(int).clip(0, U.size - 2)
    low, high = np.take_along_axis(curve, left, 1), np.take_along_axis(curve, left + 1, 1)
    return low + (high - low) * (place - left)


def _landmarks(sketch: _Sketch, brows: list[Points], lids: list[Points], lips: list[Points]) -> Float[np.ndarray, "F 68 2"]:
    """The 68 iBUG points in their order, each on the drawn geometry. Curves have 17 samples from left to right."""
    jaw = sketch.flat(sketch.outline(np.linspace(1.53 * np.pi, 0.47 * np.pi, 17)), OUTLINE_DEPTH)
    bridge = sketch.front(xy(0.0, np.linspace(-0.12, 0.22, 4)), np.linspace(0.05, 0.22, 4))
    across, down = np.array([-0.9, -0.5, 0.0, 0.5, 0.9]), np.array([0.4, 0.85, 1.0, 0.85, 0.4])
    nostrils = sketch.front(xy(0.14 * sketch.who.nose_size * across, 0.25 + 0.1 * sketch.who.nose_size * down), 0.2)
    eyes = [points for top, bottom in (lids[:2], lids[2:]) for points in (top[:, [0, 5, 11, 16]], bottom[:, [11, 5]])]
    outer_top, outer_bottom, top, bottom = lips
    mouth = [outer_top[:, [0, 3, 6, 8, 10, 13, 16]], outer_bottom[:, [13, 10, 8, 6, 3]], top[:, [0, 4, 8, 12, 16]], bottom[:, [12, 8, 4]]]
    return np.concatenate([jaw, *(brow[:, ::4] for brow in brows), bridge, nostrils, *eyes, *mouth], 1)
