"""What is measured on frames: plain functions of numpy arrays.

Frames are uint8 [N,H,W,3], RGB; `output` is what was made, `truth` what it should be. Errors and decibels take 1 for the range of a
pixel. `head_position` and `colour_amount` look at pixels alone, so that they measure output and truth in the same way.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, UInt8
from skimage.metrics import structural_similarity

Frames = UInt8[np.ndarray, "N H W 3"]

# Where a portrait stands before its background, in sides of the frame: the head is above HEAD_ROWS and seldom within
# EDGE of the left and right edges, where only the background is.
HEAD_ROWS, EDGE_ROWS, EDGE = 0.7, 0.6, 0.08
DIFFERENT = 30, 60  # of 255, in any channel: from where a pixel begins to be no background, to where it surely is none
COLOUR_SPREAD = 30  # of 255: the standard deviation of the Gaussian that says how near a colour is


def l1(output: Frames, truth: Frames) -> Float[np.ndarray, " N"]:
    """Mean absolute error of each frame, over pixels and channels."""
    return _error(output, truth).mean((1, 2, 3))


def ssim(output: Frames, truth: Frames) -> Float[np.ndarray, " N"]:
    """Structural similarity of each frame as its authors have it (Wang et al. 2004): a Gaussian window of sigma 1.5, the mean over channels."""
    how = {"channel_axis": -1, "data_range": 255, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return np.array([structural_similarity(*frames, **how) for frames in zip(output, truth, strict=True)])


def temporal_error(output: Frames, truth: Frames) -> float:
    """Mean absolute difference of what changes from frame to frame; 0 for a single frame."""
    change = [np.diff(frames.astype(np.float32), axis=0) for frames in (output, truth)]
    return float(np.abs(change[0] - change[1]).mean() / 255) if len(output) > 1 else 0.0


def psnr(output: Frames, truth: Frames) -> Float[np.ndarray, " N"]:
    """Decibels of each frame; infinite where it is exact."""
    return _decibels(_squared_error(output, truth).mean((1, 2, 3)))


def region_psnr(output: Frames, truth: Frames, inside: Bool[np.ndarray, "N H W"]) -> float:
    """Decibels of the clip, from the mean square error of all pixels that are `inside`, in all frames together."""
    return float(_decibels(_squared_error(output, truth)[inside].mean()))


def frame_change_ratio(output: Frames, truth: Frames) -> float:
    """Mean |x[t+1] - x[t]| of the output over that of the truth: above 1 it flickers, below 1 it is too still."""

    def change(frames):
        return np.abs(np.diff(frames.astype(np.float32), axis=0)).mean()

    if (expected := change(truth)) == 0:
        raise ValueError("frame_change_ratio needs a truth that moves")
    return float(change(output) / expected)


def correlation(a: Float[np.ndarray, "N *axes"], b: Float[np.ndarray, "N *axes"]) -> float:
    """Pearson's correlation over time; 0 if either is constant, for then nothing was followed.

    Of vectors, with inner products in place of products: an axis along which little moves counts little.
    """
    if not np.ptp(a, axis=0).any() or not np.ptp(b, axis=0).any():
        return 0.0
    a, b = a - a.mean(0), b - b.mean(0)
    return float((a * b).sum() / np.sqrt(np.square(a).sum() * np.square(b).sum()))


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
    distance = np.square(frames[:, y0:y1, x0:x1].astype(np.float64) - colour).sum(-1)
    return np.exp(-distance / (2 * COLOUR_SPREAD**2)).sum((1, 2))


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


def _error(output: Frames, truth: Frames) -> Float[np.ndarray, "N H W 3"]:
    return np.abs(output.astype(np.float32) - truth) / 255


def _squared_error(output: Frames, truth: Frames) -> Float[np.ndarray, "N H W 3"]:
    return np.square(_error(output, truth))


def _decibels(mean_square_error: Float[np.ndarray, "*shape"] | np.floating) -> Float[np.ndarray, "*shape"] | np.floating:
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.asarray(mean_square_error, np.float64))
