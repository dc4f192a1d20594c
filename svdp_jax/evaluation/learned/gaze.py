"""Gaze: how far the generated face looks from where the driving one does, by L2CS-Net (Abdelrahman et al. 2022) trained on Gaze360.

    frame, landmarks -> face, 448 pixels -> ResNet-50 -> two times 90 bins of 4 degrees -> expected yaw and pitch, degrees

Written after l2cs/ of Ahmednull/L2CS-Net. There the head `fc_yaw_gaze` is read as "pitch" and the other as "yaw", in training, too; but
what is called pitch is the angle to the side wherever a vector is made of the two. Here yaw is to the side and comes from `fc_yaw_gaze`.

The network is transformers' ResNet-50 with two heads, as the tests compare. Not checked: the published weights, which were not at hand,
and that their file is read without running code in it (weights_only; train.py writes a plain dictionary of tensors). Figures elsewhere
were measured on boxes of RetinaFace; these are made of landmarks.
"""

from __future__ import annotations

import pathlib
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from svdp_jax.evaluation.learned import weights
from svdp_jax.evaluation.learned.boxes import detector_box
from svdp_jax.evaluation.learned.interface import Chunk, Clip, Needed, Outcome

SQUEEZED, SIZE = 224, 448  # pixels, to which a face is resized in turn
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, at 0..1
BINS, WIDTH, FIRST = 90, 4, -180  # of one angle; degrees


class Gaze:
    name = "gaze"
    uses = ("landmarks",)
    needs = (
        Needed(
            "L2CSNet_gaze360.pkl",
            "L2CS-Net, ResNet-50, trained on Gaze360",
            "https://github.com/Ahmednull/L2CS-Net (its README links a folder on Google Drive)",
            "see there",
        ),
    )
    protocol = (
        "L2CS-Net (ResNet-50, Gaze360) on each generated frame and the reference (driving) frame of the same number. A face is the box around its landmarks, "
        "up to the forehead, within the frame, squeezed to 224 x 224 and enlarged to 448 x 448 pixels, bilinear, normalised as ImageNet is. Degrees: "
        "gaze_angle between the two directions; gaze_yaw and gaze_pitch, absolute differences of the angles, and gaze_mae, the mean of these two. The mean "
        "over the frames of a clip in which both faces were found; the others are counted. The paper's MAE is most likely gaze_angle, which L2CS-Net's own "
        "evaluation prints as MAE; the paper does not say."
    )

    def __init__(self, folder: pathlib.Path):
        (path,) = weights.found(self.name, folder, self.needs, packages=("torch",))
        self.network = weights.filled(network(), path, unused=("fc_finetune.",))

    def begin(self, clip: Clip) -> None:
        self.angles: list[np.ndarray] = []  # [N,2 videos,2]
        self.counts = {"frames": 0, "generated_without_face": 0, "reference_without_face": 0}

    def add(self, chunk: Chunk) -> None:
        landmarks = list(zip(chunk.generated_landmarks, chunk.reference_landmarks, strict=True))
        frames = zip(chunk.generated, chunk.reference, landmarks, strict=True)
        self.counts["frames"] += len(landmarks)
        for name, number in ("generated", 0), ("reference", 1):
            self.counts[f"{name}_without_face"] += sum(pair[number] is None for pair in landmarks)
        crops = [(face(one, ours), face(other, theirs)) for one, other, (ours, theirs) in frames if ours is not None and theirs is not None]
        for part in weights.batches(crops, weights.BATCH // 2):
            self.angles.append(angles(self.network, np.concatenate(part).reshape(-1, SIZE, SIZE, 3)).reshape(-1, 2, 2))

    def finish(self) -> Outcome:
        if not self.angles:
            return Outcome({}, self.counts)
        made, true = np.concatenate(self.angles).swapaxes(0, 1)
        yaw, pitch = np.abs(made - true).mean(0)
        turned = float(between(directions(made), directions(true)).mean())
        return Outcome({"gaze_angle": turned, "gaze_mae": float(yaw + pitch) / 2, "gaze_yaw": float(yaw), "gaze_pitch": float(pitch)}, self.counts)

    def overall(self) -> Outcome:
        return Outcome({}, {})


def face(frame: UInt8[np.ndarray, "H W 3"], landmarks: Float32[np.ndarray, "K 2"]) -> UInt8[np.ndarray, "448 448 3"]:
    """What of a frame the network sees."""
    height, width, _ = frame.shape
    x0, y0, x1, y1 = detector_box(landmarks).astype(int)
    x0, y0 = np.clip((x0, y0), 0, (width - 1, height - 1))
    part = frame[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
    return cv2.resize(cv2.resize(part, (SQUEEZED, SQUEEZED)), (SIZE, SIZE))


def network() -> Any:
    """ResNet-50 with two heads, named as published."""
    from torch import nn

    class Bottleneck(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
            self.downsample = None
            if inputs != 4 * width:
                self.downsample = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride=stride, bias=False), nn.BatchNorm2d(4 * width))

        def forward(self, x):
            out = self.bn1(self.conv1(x)).relu()
            out = self.bn2(self.conv2(out)).relu()
            return (self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x))).relu()

    parts = {"conv1": nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), "bn1": nn.BatchNorm2d(64)}
    inputs = 64
    for number, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        stride = 1 if number == 1 else 2
        parts[f"layer{number}"] = nn.Sequential(Bottleneck(inputs, width, stride), *(Bottleneck(4 * width, width, 1) for _ in range(1, blocks)))
        inputs = 4 * width
    return nn.ModuleDict(parts | {"fc_yaw_gaze": nn.Linear(inputs, BINS), "fc_pitch_gaze": nn.Linear(inputs, BINS)})


def angles(network: Any, crops: UInt8[np.ndarray, "N 448 448 3"]) -> Float[np.ndarray, "N 2"]:
    """Yaw and pitch of each face, in degrees."""
    import torch
    from torch.nn import functional as F

    mean, deviation = (torch.tensor(values, device=weights.device())[:, None, None] for values in (MEAN, DEVIATION))
    x = network["bn1"](network["conv1"]((weights.pixels(crops) / 255 - mean) / deviation)).relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for number in range(1, 5):
        x = network[f"layer{number}"](x)
    x = x.mean((2, 3))
    return np.stack([expectation(network[name](x).double().cpu().numpy()) for name in ("fc_yaw_gaze", "fc_pitch_gaze")], axis=1)


def expectation(logits: Float[np.ndarray, "N bins"]) -> Float[np.ndarray, " N"]:
    """The expected angle of bins that have these logits, in degrees."""
    likely = np.exp(logits - logits.max(1, keepdims=True))
    return likely @ np.arange(logits.shape[1]) / likely.sum(1) * WIDTH + FIRST


def directions(angles: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "N 3"]:
    """Unit vectors of yaw and pitch."""
    yaw, pitch = np.deg2rad(angles).T
    return -np.stack([np.cos(pitch) * np.sin(yaw), np.sin(pitch), np.cos(pitch) * np.cos(yaw)], axis=1)


def between(one: Float[np.ndarray, "N 3"], other: Float[np.ndarray, "N 3"]) -> Float[np.ndarray, " N"]:
    """The angle between unit vectors, in degrees."""
    return np.rad2deg(np.arctan2(np.linalg.norm(np.cross(one, other), axis=1), (one * other).sum(1)))
