"""What is measured on frames: plain functions of numpy arrays.

Frames are uint8 [N,H,W,3], RGB; `output` is what was made, `truth` what it should be. Errors and decibels take 1 for the range of a
pixel.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, UInt8
from skimage.metrics import structural_similarity

Frames = UInt8[np.ndarray, "N H W 3"]


def l1(output: Frames, truth: Frames) -> Float[np.ndarray, " N"]:
    """Mean absolute error of each frame, over pixels and channels."""
    return error(output, truth).mean((1, 2, 3))


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
    return decibels(_squared_error(output, truth).mean((1, 2, 3)))


def region_psnr(output: Frames, truth: Frames, inside: Bool[np.ndarray, "N H W"]) -> float:
    """Decibels of the clip, from the mean square error of all pixels that are `inside`, in all frames together."""
    return float(decibels(_squared_error(output, truth)[inside].mean()))


def frame_change_ratio(output: Frames, truth: Frames, *, every: int = 1) -> float:
    """Mean |x[t+1] - x[t]| of the output over that of the truth: above 1 it flickers, below 1 it is too still. With `every` only where
    windows of so many frames meet: above what it is elsewhere, their seams show."""

    def change(frames):
        return np.abs(np.diff(frames.astype(np.float32), axis=0))[every - 1 :: every].mean()

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


def error(output: Frames, truth: Frames) -> Float[np.ndarray, "N H W 3"]:
    """Absolute error of every value."""
    return np.abs(output.astype(np.float32) - truth) / 255


def _squared_error(output: Frames, truth: Frames) -> Float[np.ndarray, "N H W 3"]:
    return np.square(error(output, truth))


def decibels(mean_square_error: Float[np.ndarray, "*shape"] | np.floating) -> Float[np.ndarray, "*shape"] | np.floating:
    """PSNR of mean square errors; infinite for 0."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(np.asarray(mean_square_error, np.float64))
