"""A driver for those who have no other person: the same clip in other colours and other light.

What it costs: the driver is still the target's own face. Its colours and its texture are of no use to the model then, its
shape (of eyes, nose and lips) is, and a model that has learned to trust it will draw some of a stranger's shape from a stranger's
video. Pairs of two people (`data.liveportrait`) do not have this flaw.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import UInt8


def recolour(frames: UInt8[np.ndarray, "N H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "N H W 3"]:
    """The clip under one strong change of colour, light and sharpness, drawn from `rng`; nothing moves.

    No grain: it would make the video ten times as large, and as slow to read.
    """
    height, width = frames.shape[1:3]
    mix = _saturation(rng.uniform(0.0, 1.8)) @ _hue(rng.uniform(-np.pi, np.pi)) * rng.uniform(0.6, 1.5, size=(1, 3))
    gamma, contrast, bias = np.exp(rng.uniform(-0.5, 0.5)), rng.uniform(0.5, 1.3), rng.uniform(-0.15, 0.15)
    angle, fall = rng.uniform(0, 2 * np.pi), rng.uniform(0, 1.2)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    light = np.exp(fall * (x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(2)).astype(np.float32)[..., None]  # from one side
    softness = rng.uniform(0, 0.004) * height
    tones = np.linspace(0, 1, 256, dtype=np.float32) ** np.float32(gamma)
    changed = np.empty_like(frames)
    for frame, out in zip(frames, changed, strict=True):
        picture = cv2.transform(tones[frame], mix.astype(np.float32)) * light
        picture = (picture - 0.5) * contrast + 0.5 + bias
        if softness > 0.3:
            picture = cv2.GaussianBlur(picture, (0, 0), softness)
        out[:] = np.rint(np.clip(picture, 0, 1) * 255)
    return changed


def _hue(angle: float) -> np.ndarray:
    """Turns colours around grey (Rodrigues' formula)."""
    axis = np.full(3, 1 / np.sqrt(3))
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * np.outer(axis, axis)


def _saturation(factor: float) -> np.ndarray:
    """Moves colours away from the grey of their own brightness, or to it."""
    return factor * np.eye(3) + (1 - factor) * np.array([0.299, 0.587, 0.114])
