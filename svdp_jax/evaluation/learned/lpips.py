"""LPIPS (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"), AlexNet, version 0.1.

    frames [N,H,W,3] of both videos -> -1..1, shifted and scaled -> five feature maps of AlexNet, each place a unit vector
        -> squared differences, weighted over channels, averaged over places, added over the five -> [N]

Written after lpips/lpips.py and lpips/pretrained_networks.py of richzhang/PerceptualSimilarity. With the published heads on a random
AlexNet it gave the numbers of the package lpips 0.1.4, to the bit. Not checked: AlexNet's published weights, which were not at hand.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from svdp_jax.evaluation.learned import weights
from svdp_jax.evaluation.learned.interface import Chunk, Clip, Needed, Outcome

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the channels, at -1..1
HEADS = {f"lin{layer}.model.1.weight": (1, channels, 1, 1) for layer, channels in enumerate((64, 192, 384, 256, 256))}


class Lpips:
    name = "lpips"
    uses = ()
    needs = (
        Needed(
            "alexnet-owt-7be5be79.pth",
            "torchvision's AlexNet",
            "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
            "see there; torchvision's code is BSD-3-Clause",
        ),
        Needed(
            "lpips_alex.pth",
            "LPIPS's linear heads, v0.1, alex.pth",
            "https://github.com/richzhang/PerceptualSimilarity/tree/master/lpips/weights/v0.1",
            "BSD-2-Clause",
        ),
    )
    protocol = (
        "LPIPS of each generated frame to the reference frame of the same number, AlexNet, v0.1, at the size that the frames have, neither cropped nor "
        "resized; the mean over the frames of a clip."
    )

    def __init__(self, folder: pathlib.Path):
        backbone, heads = weights.found(self.name, folder, self.needs, packages=("torch",))
        self.network = weights.filled(network(), backbone, unused=("classifier.",))
        self.heads = [head.to(weights.device()) for head in weights.checked(weights.read(heads), HEADS, heads).values()]

    def begin(self, clip: Clip) -> None:
        self.distances: list[np.ndarray] = []

    def add(self, chunk: Chunk) -> None:
        if chunk.generated.shape != chunk.reference.shape:
            raise ValueError(f"frames of shapes {chunk.generated.shape} and {chunk.reference.shape}: LPIPS compares frames of one size")
        pairs = zip(weights.batches(chunk.generated), weights.batches(chunk.reference), strict=True)
        self.distances += [distances(self.network, self.heads, *pair) for pair in pairs]

    def finish(self) -> Outcome:
        values = np.concatenate([*self.distances, np.empty(0)])
        return Outcome({"lpips": float(values.mean())} if len(values) else {}, {"frames": len(values)})

    def overall(self) -> Outcome:
        return Outcome({}, {})


def network() -> Any:
    """AlexNet's convolutions, named as torchvision names them."""
    from torch import nn

    features = nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    return nn.ModuleDict({"features": features})


def distances(network: Any, heads: list[Any], one: UInt8[np.ndarray, "N H W 3"], other: UInt8[np.ndarray, "N H W 3"]) -> Float[np.ndarray, " N"]:
    """LPIPS of each pair of frames; `heads` are weights [1,C,1,1] of the five layers."""
    import torch

    shift, scale = (torch.tensor(values, device=weights.device())[:, None, None] for values in (SHIFT, SCALE))
    x = (weights.pixels(np.concatenate([one, other])) / 127.5 - 1 - shift) / scale
    total, heads = 0, iter(heads)
    for layer in network["features"]:
        x = layer(x)
        if isinstance(layer, torch.nn.ReLU):
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            first, second = unit.chunk(2)
            total = total + ((first - second).square() * next(heads)).sum(1).mean((1, 2))
    return total.cpu().numpy()
