"""Shared by the tests of the learned metrics: random weights in published layouts, a face that can be put anywhere."""

from fractions import Fraction

import numpy as np

from svdp_jax.data import detectors
from svdp_jax.evaluation.learned import Clip

AVERAGE = detectors.average_face()  # 68 landmarks, in sides of a box
CLIP = Clip(Fraction(25))


def landmarks_at(x, y, side):
    return (AVERAGE * side + [x, y]).astype(np.float32)


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def random_state(torch, shapes):
    """Tensors of these shapes that keep what goes through a network about as large as it was."""
    state = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            state[name] = torch.randn(shape) * (2 / int(np.prod(shape[1:]))) ** 0.5
        else:
            state[name] = torch.rand(shape) + 0.5 if name.endswith(("weight", "var")) else torch.randn(shape) * 0.1
    return state


def batch_norm(name, width):
    return {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}


def empty(torch, shapes):
    """Zeros of these shapes that take no memory, nor space in a file."""
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
