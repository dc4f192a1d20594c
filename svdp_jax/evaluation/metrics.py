"""What is measured on frames: plain functions of numpy arrays.

Frames are uint8 [N,H,W,3], RGB; `output` is what was made, `truth` what it should be. Errors and decibels take 1 for the range of a
pixel.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

Frames = UInt8[np.ndarray, "N H W 3"]
SSIM_WINDOW = 11  # pixels


def l1(output: Frames, truth: Frames) -> Float[np.ndarray, " N"]:
    """Mean absolute error of each frame, over pixels and channels."""
    return error(output, truth).mean((1, 2, 3))


def ssim(output: Frames, truth: Frames) -> Float[np.ndarray, " N"]:
    """Structural similarity of each frame as its authors have it (Wang et al. 2004): a Gaussian window of sigma 1.5 on 11 x 11 pixels, the mean over channels and
    over windows that lie within the frame. ValueError for frames smaller than a window."""
    if min(output.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"SSIM takes windows of {SSIM_WINDOW} pixels; frames are {output.shape[2]}x{output.shape[1]}")
    return np.array([_ssim(*(frame.astype(np.float32) / 255 for frame in frames)) for frames in zip(output, truth, strict=True)])


def _ssim(x: Float[np.ndarray, "H W 3"], y: Float[np.ndarray, "H W 3"]) -> float:
    edge = SSIM_WINDOW // 2
    mean = lambda values: cv2.GaussianBlur(values, (SSIM_WINDOW, SSIM_WINDOW), 1.5)[edge:-edge, edge:-edge]
    mean_x, mean_y = mean(x), mean(y)
    variances, covariance = mean(x * x) - mean_x**2 + mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    similar = (2 * mean_x * mean_y + 0.01**2) * (2 * covariance + 0.03**2) / ((mean_x**2 + mean_y**2 + 0.01**2) * (variances + 0.03**2))
    return float(similar.mean(dtype=np.float64))


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
