"""Fréchet distance between two sets of features, each taken for a normal distribution: what FID and FVD are of.

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

With C1 = A A^T and C2 = B B^T, (C1 C2)^(1/2) has the singular values of A^T B for eigenvalues: no square root of a matrix is
taken, nothing imaginary is left over, and fewer samples than features need no trick.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def distance(one: Float[np.ndarray, "N D"], other: Float[np.ndarray, "M E"]) -> float:
    """Of features in rows. ValueError where a set has fewer than two, or they have not as many features each.

    It is biased upwards, the more so the fewer samples there are: compare figures of equal numbers alone."""
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise ValueError(f"features of shapes {one.shape} and {other.shape}: rows of the same length are compared")
    (mean, factor), (other_mean, other_factor) = moments(one), moments(other)
    shared = np.linalg.svd(factor.T @ other_factor, compute_uv=False).sum()
    spread = np.square(factor).sum() + np.square(other_factor).sum() - 2 * shared
    return float(np.square(mean - other_mean).sum() + max(spread, 0.0))


def moments(features: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D K"]]:
    """The mean, and a factor A of the covariance A A^T, divided by N as cdfvd does; K is the lesser of N and D. ValueError for fewer than two."""
    if len(features) < 2:
        raise ValueError(f"{len(features)} samples have no covariance; give at least 2")
    features = features.astype(np.float64)
    mean = features.mean(0)
    return mean, np.linalg.qr((features - mean) / np.sqrt(len(features)), mode="r").T
