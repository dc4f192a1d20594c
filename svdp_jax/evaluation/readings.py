"""What is read from frames of rendered portraits: where the head is, how far the mouth is open, where the eyes look.

Frames are uint8 [N, H, W, 3]. Pixels alone are looked at, at places that the truth's landmarks give, so that output and truth are measured in the same way.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from svdp_jax.data import drawing

Frames = UInt8[np.ndarray, "N H W 3"]

# Where a portrait stands before its background, in sides of the frame: the head is above HEAD_ROWS and seldom within
# EDGE of the left and right edges, where only the background is.
HEAD_ROWS, EDGE_ROWS, EDGE = 0.7, 0.6, 0.08
DIFFERENT = 30, 60  # of 255, in any channel: from where a pixel begins to be no background, to where it surely is none
COLOUR_SPREAD = 30  # of 255: the standard deviation of the Gaussian that says how near a colour is

# Of gaze. An eye is looked at in its own axes, with its middle between its corners and half the distance of these for a unit; it has GRID x GRID points.
EYES = [36, 37, 38, 39, 40, 41], [42, 43, 44, 45, 46, 47]  # iBUG: corner, two of the upper lid, corner, two of the lower lid
GRID = 41
DARK = 90.0  # of 255: luma below which a pixel is iris or pupil, the more so the darker it is
OPEN = 0.6  # of an eye's half width: less between its lids is a blink, and says nothing
LIDS = 0.08, 0.04  # within an eye, left out below the upper and above the lower lid: lashes and their shadow
HIGHLIGHT = 0.036  # by which the light in the eye moves the middle of what is dark
# Where pupils go at gaze 1, in the units of an eye: the sine of an angle, were it a ball as wide as the eye.
REACH = 0.13 / 0.34, 0.07 / 0.34

# Of the mouth. It is looked at in its own axes, with its middle between its corners and half the distance of these for a unit.
CORNERS = 48, 54  # iBUG
ACROSS, DOWN = np.linspace(-0.3, 0.3, 17), np.linspace(-0.3, 1.0, 101)
INSIDE_SPREAD = 20  # of 255, as COLOUR_SPREAD
OPENING = 5.87, 0.07  # how far it is open: so many times the height of its inside, as a head has units, and this, for what lies under tongue and teeth and between pixels


def head_position(frames: Frames) -> Float[np.ndarray, "N 2"]:
    """Where the head is, x and y in sides of the frame: the centroid of what is not background, above the shoulders.

    The background, a gradient, is a plane fitted per channel to the left and right edges of the clip's median frame.
    """
    rows, columns = _centres(frames)
    head = frames[:, : int(HEAD_ROWS * len(rows))]
    difference = np.abs(head - _background(frames)[: head.shape[1]]).max(-1)
    weight = np.clip((difference - DIFFERENT[0]) / (DIFFERENT[1] - DIFFERENT[0]), 0, 1)
    # Skin may have the background's colour, but lies between hair, ears or outlines that do not.
    enclosed = np.minimum(np.maximum.accumulate(weight, 2), np.maximum.accumulate(weight[:, :, ::-1], 2)[:, :, ::-1])
    weight = enclosed + 1e-9  # an empty frame has its middle
    return np.stack([weight.sum(1) @ columns, weight.sum(2) @ rows[: head.shape[1]]], -1) / weight.sum((1, 2))[:, None]


def colour_amount(frames: Frames, colour: tuple[int, int, int], box: Float[np.ndarray, " 4"]) -> Float[np.ndarray, " N"]:
    """How many pixels of `colour` there are in the box x0, y0, x1, y1 (pixels, the same for all frames); near colours count in part."""
    height, width = frames.shape[1:3]
    x0, y0 = np.clip(np.floor(box[:2]), 0, (width, height)).astype(int)
    x1, y1 = np.clip(np.ceil(box[2:]) + 1, 0, (width, height)).astype(int)
    return _near(frames[:, y0:y1, x0:x1], colour, COLOUR_SPREAD).sum((1, 2))


def _near(pixels: UInt8[np.ndarray, "*shape 3"], colour: tuple[int, int, int], spread: float) -> Float[np.ndarray, "*shape"]:
    """How near each is to a colour, 0..1."""
    return np.exp(-np.square(pixels.astype(np.float64) - colour).sum(-1) / (2 * spread**2))


def mouth_opening(frames: Frames, landmarks: Float32[np.ndarray, "N 68 2"], inside: tuple[int, int, int]) -> Float[np.ndarray, " N"]:
    """How far the mouth is open, 0 closed to 1 wide: the height of what has the colour of its `inside`, along its middle.

    On the truth it is 0.05 from what was drawn, in the mean."""
    found = np.empty(len(frames))
    for number, frame in enumerate(frames):
        left, right = landmarks[number, CORNERS].astype(np.float64)
        pixels, half = _looked_at(frame, left, right, ACROSS, DOWN)
        found[number] = _near(pixels, inside, INSIDE_SPREAD).sum(0).mean() * (DOWN[1] - DOWN[0]) * half
    factor, least = OPENING
    return factor * found / (drawing.HEAD_UNIT * frames.shape[1]) + least


def _looked_at(frame: UInt8[np.ndarray, "H W 3"], left: np.ndarray, right: np.ndarray, across: np.ndarray, down: np.ndarray) -> tuple[UInt8[np.ndarray, "D A 3"], float]:
    """A frame in axes whose origin is between two points and whose unit is half of their distance: its pixels there, and that unit in pixels."""
    half = float(np.linalg.norm(right - left) / 2)
    axis = (right - left) / (2 * half)
    x, y = np.meshgrid(across, down)
    places = ((left + right) / 2 + half * np.stack([x, y], -1) @ np.stack([axis, [-axis[1], axis[0]]])).astype(np.float32)
    return cv2.remap(frame, places[..., 0], places[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), half


def _background(frames: Frames) -> Float[np.ndarray, "H W 3"]:
    rows, columns = _centres(frames)
    x, y = np.meshgrid(columns, rows)
    edge = (np.minimum(x, 1 - x) < EDGE) & (y < EDGE_ROWS)
    places = np.stack([np.ones_like(x), x, y], -1)
    plane = np.linalg.lstsq(places[edge], np.median(frames, axis=0)[edge], rcond=None)[0]
    return places @ plane


def _centres(frames: Frames) -> tuple[Float[np.ndarray, " H"], Float[np.ndarray, " W"]]:
    """Places of pixel centres, 0..1."""
    height, width = frames.shape[1:3]
    return (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width


def gaze_angles(gaze_x: Float[np.ndarray, " N"], gaze_y: Float[np.ndarray, " N"]) -> Float[np.ndarray, "N 2"]:
    """Degrees to the image's right and down of a drawn gaze (`drawing.Motion`)."""
    return np.degrees(np.arcsin(np.stack([REACH[0] * gaze_x, REACH[1] * gaze_y], axis=-1)))


def gaze(frames: Frames, landmarks: Float32[np.ndarray, "N 68 2"]) -> Float[np.ndarray, "N 2"]:
    """Degrees to the image's right and down that the eyes look, NaN in a blink: where the middle of what is dark between the lids is, the mean of both eyes.

    On the truth it is 1.2 degrees from what was drawn, on each axis, in the mean; drawn gazes are spread by 14 and 7 degrees."""
    found = np.full((len(frames), len(EYES), 2), np.nan)
    for number, frame in enumerate(frames):
        for eye, indices in enumerate(EYES):
            found[number, eye] = _pupil(frame, landmarks[number, indices].astype(np.float64))
    seen = np.isfinite(found).all(-1).sum(-1)
    place = np.where(seen[:, None] > 0, np.nansum(found, axis=1) / np.maximum(seen, 1)[:, None], np.nan)
    return np.degrees(np.arcsin(np.clip(place - (HIGHLIGHT, 0), -1, 1)))


def _pupil(frame: UInt8[np.ndarray, "H W 3"], eye: Float[np.ndarray, "6 2"]) -> Float[np.ndarray, " 2"]:
    """Where the middle of what is dark is, in the eye's axes; NaN in a blink."""
    across = np.linspace(-1, 1, GRID)
    pixels, half = _looked_at(frame, eye[0], eye[3], across, across)
    if np.linalg.norm(eye[[1, 2]] - eye[[5, 4]], axis=1).mean() < OPEN * half:
        return np.full(2, np.nan)
    x, y = np.meshgrid(across, across)
    axis = (eye[3] - eye[0]) / (2 * half)
    lids = (eye - (eye[0] + eye[3]) / 2) @ np.stack([axis, [-axis[1], axis[0]]]).T / half
    upper, lower = (np.interp(across, [-1, *lids[points, 0], 1], [0, *lids[points, 1], 0]) for points in ([1, 2], [5, 4]))
    dark = np.clip(1 - pixels @ np.array(drawing.LUMA) / DARK, 0, None) * (y >= upper + LIDS[0]) * (y <= lower - LIDS[1])
    return np.array([(dark * x).sum(), (dark * y).sum()]) / dark.sum() if dark.sum() > 1 else np.full(2, np.nan)
