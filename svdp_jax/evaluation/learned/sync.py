"""Sync-C and Sync-D: do the lips go with the sound? SyncNet (Chung & Zisserman 2016, "Out of Time: Automated Lip Sync in the Wild").

    frames at 25 a second, landmarks -> faces, 224 pixels -> 5 at a time through one network -> lips [N,1024]
    audio at 16 kHz -> 13 cepstral coefficients 100 times a second -> 20 at a time through another -> sounds [N,1024]
    distance of lips n and sounds n + k, averaged over n, for k = -15..15 -> Sync-D the least, Sync-C the median less the least

Written after SyncNetInstance.py, SyncNetModel.py and run_pipeline.py of joonson/syncnet_python, and after python_speech_features. From the
boxes of faces on, it gave their figures on random weights (to 1e-5), and the coefficients of python_speech_features 0.6 to the bit.
Not checked: the published weights, which were not at hand, and with them any published figure. It differs from syncnet_python in that
faces come from landmarks and not from S3FD, and are neither compressed to XVID nor to JPEG on their way; in that a clip is one track, through cuts and
gaps, of any length, where it takes tracks of more than 100 frames; and at the ends of the median over time, where it puts zeros.
"""

from __future__ import annotations

import itertools
import pathlib
from collections import deque
from typing import Any

import cv2
import numpy as np
import scipy.fft
from jaxtyping import Float, Float32, UInt8

from svdp_jax.data import video
from svdp_jax.evaluation.learned import weights
from svdp_jax.evaluation.learned.boxes import detector_box
from svdp_jax.evaluation.learned.interface import AUDIO_RATE, Chunk, Clip, Needed, Outcome

RATE = 25  # frames a second
SAMPLES = AUDIO_RATE // RATE  # of audio, per frame
WINDOW, COEFFICIENTS, STEPS = 5, 13, 4  # frames seen at once; of the cepstrum; of the cepstrum in a frame
SHIFT = 15  # frames, the largest offset
SIZE, MARGIN, GREY = 224, 0.4, 110  # pixels; of half a box's side; of what lies beyond the frame
MEDIAN = 6  # frames on either side, over which a face's place is smoothed


class Sync:
    name = "sync"
    uses = ("landmarks", "audio")
    needs = (
        Needed(
            "syncnet_v2.model",
            "SyncNet",
            "http://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model (by download_model.sh of https://github.com/joonson/syncnet_python)",
            "see there; the code's is MIT",
        ),
    )
    protocol = (
        "SyncNet on the generated frames and the clip's audio (mono, 16 kHz, 16 bits), frames brought to 25 a second by leaving some out or showing some "
        "again. A face's box is around its landmarks, up to the forehead; its middle and half its longer side s are medians over 13 frames (the first and "
        "last repeated); what is seen is the square from 1.4 s left to 1.4 s right of the middle and from s above to 1.8 s below it, grey (110) beyond the "
        "frame, resized to 224 x 224, bilinear, BGR, 0..255. Through frames without a face, which are counted, the last box is held; before the first face, "
        "neither frames nor audio are used. Windows of 5 frames and of 20 steps of 13 mel-frequency cepstral coefficients (python_speech_features' defaults: "
        "25 ms every 10 ms); mean distance of their embeddings over a clip at each offset of -15 to 15 frames, zeros beyond the ends. Sync-D is the least of "
        "the 31, Sync-C their median less the least. In clips shorter than the 100 frames that syncnet_python asks for, the zeros weigh more: do not compare "
        "those. A clip of which less than half shows a face has no figure."
    )

    def __init__(self, folder: pathlib.Path):
        (path,) = weights.found(self.name, folder, self.needs, packages=("torch",))
        self.network = weights.filled(network(), path)

    def begin(self, clip: Clip) -> None:
        self.audio = clip.audio
        self.wanted = video.at_rate(itertools.count(), fps=clip.fps, rate=RATE)  # numbers of the frames to take, some twice
        self.due, self.number = next(self.wanted), 0
        self.before = self.without = 0  # frames: before the first face; in all, without one
        self.boxes: list[np.ndarray] = []  # middle and half a side, of each frame from the first face on
        self.waiting: deque[np.ndarray] = deque()  # frames that are not cropped yet
        self.crops: list[np.ndarray] = []  # that are not embedded yet
        self.lips: list[np.ndarray] = []

    def add(self, chunk: Chunk) -> None:
        for frame, landmarks in zip(chunk.generated, chunk.generated_landmarks, strict=True):
            while self.due == self.number:
                self._take(frame, landmarks)
                self.due = next(self.wanted)
            self.number += 1

    def finish(self) -> Outcome:
        while self.waiting:
            self._crop()
        if len(self.crops) >= WINDOW:
            self._embed()
        counts = {"frames": self.before + len(self.boxes), "generated_without_face": self.without, "windows": 0}  # of frames at RATE
        if self.audio is None:
            return Outcome({}, counts | {"without_audio": 1})
        audio = self.audio[self.before * SAMPLES :][: len(self.boxes) * SAMPLES]
        windows = len(audio) // SAMPLES - WINDOW  # one fewer than fit, as syncnet_python has it
        if windows < 1 or 2 * self.without > counts["frames"]:
            return Outcome({}, counts)
        cepstrum = mfcc(np.rint(np.clip(audio.astype(np.float64) * 32768, -32768, 32767)))
        means = distances(np.concatenate(self.lips)[:windows], sounds(self.network, cepstrum, windows))
        least = float(means.min())
        return Outcome({"sync_d": least, "sync_c": float(np.median(means)) - least}, counts | {"windows": windows})

    def overall(self) -> Outcome:
        return Outcome({}, {})

    def _take(self, frame: UInt8[np.ndarray, "H W 3"], landmarks: Float32[np.ndarray, "K 2"] | None) -> None:
        self.without += landmarks is None
        if landmarks is None and not self.boxes:
            self.before += 1
            return
        self.boxes.append(self.boxes[-1] if landmarks is None else place(landmarks))
        self.waiting.append(frame)
        if len(self.waiting) > MEDIAN:
            self._crop()

    def _crop(self) -> None:
        """The frame that waits longest: all boxes are known that its median is of."""
        number, last = len(self.boxes) - len(self.waiting), len(self.boxes) - 1
        near = [self.boxes[min(max(other, 0), last)] for other in range(number - MEDIAN, number + MEDIAN + 1)]
        self.crops.append(crop(self.waiting.popleft(), np.median(near, axis=0)))
        if len(self.crops) == weights.BATCH + WINDOW - 1:
            self._embed()

    def _embed(self) -> None:
        self.lips.append(lips(self.network, np.stack(self.crops)))
        self.crops = self.crops[1 - WINDOW :]


def place(landmarks: Float32[np.ndarray, "K 2"]) -> Float[np.ndarray, " 3"]:
    """Middle x, y and half the longer side of a face's box."""
    x0, y0, x1, y1 = detector_box(landmarks)
    return np.array([(x0 + x1) / 2, (y0 + y1) / 2, max(x1 - x0, y1 - y0) / 2])


def crop(frame: UInt8[np.ndarray, "H W 3"], place: Float[np.ndarray, " 3"]) -> UInt8[np.ndarray, "224 224 3"]:
    """The face and what is around it, more of that below than above."""
    height, width, _ = frame.shape
    half = max(float(place[2]), 1.0)
    around = int(half * (1 + 2 * MARGIN))
    x, y = np.clip(place[:2], 0, (width - 1, height - 1)) + around  # the middle is on the frame, so that there is something to see
    padded = cv2.copyMakeBorder(frame, around, around, around, around, cv2.BORDER_CONSTANT, value=(GREY,) * 3)
    rows = slice(int(y - half), int(y + half * (1 + 2 * MARGIN)))
    columns = slice(int(x - half * (1 + MARGIN)), int(x + half * (1 + MARGIN)))
    return cv2.resize(padded[rows, columns], (SIZE, SIZE))


def mfcc(signal: Float[np.ndarray, " samples"]) -> Float[np.ndarray, "T 13"]:
    """Mel-frequency cepstral coefficients of 16 bits at AUDIO_RATE, as python_speech_features.mfcc makes them by default: frames of 25 ms
    every 10 ms without a window, the last filled up with zeros; 26 triangular filters up to 8 kHz; the first coefficient is the logarithm of the energy."""
    length, step, transform, filters, lifter = 400, 160, 512, 26, 22
    emphasised = np.append(signal[:1], signal[1:] - 0.97 * signal[:-1])
    count = 1 + max(0, -(-(len(signal) - length) // step))
    padded = np.pad(emphasised, (0, (count - 1) * step + length - len(signal)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, length)[::step]
    power = np.square(np.abs(np.fft.rfft(frames, transform))) / transform
    energies, energy = (np.where(x == 0, np.finfo(float).eps, x) for x in (power @ mel_filters(filters, transform).T, power.sum(1)))
    lift = 1 + lifter / 2 * np.sin(np.pi * np.arange(COEFFICIENTS) / lifter)
    cepstrum = scipy.fft.dct(np.log(energies), type=2, axis=1, norm="ortho")[:, :COEFFICIENTS] * lift
    return np.concatenate([np.log(energy)[:, None], cepstrum[:, 1:]], axis=1)


def mel_filters(count: int, transform: int) -> Float[np.ndarray, "count bins"]:
    """Triangles over the bins of a Fourier transform of a real signal at AUDIO_RATE, evenly spaced in mels."""
    mels = np.linspace(0, 2595 * np.log10(1 + AUDIO_RATE / 2 / 700), count + 2)
    edges = np.floor((transform + 1) * 700 * (10 ** (mels / 2595) - 1) / AUDIO_RATE)
    left, middle, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = np.arange(transform // 2 + 1)
    rising = np.where((left <= bins) & (bins < middle), (bins - left) / (middle - left), 0)
    return np.where((middle <= bins) & (bins < right), (right - bins) / (right - middle), rising)


def network() -> Any:
    """SyncNet, named as published."""
    from torch import nn

    def convolution(inputs, outputs, kernel, stride=1, padding=0):
        layer, norm = (nn.Conv3d, nn.BatchNorm3d) if len(kernel) == 3 else (nn.Conv2d, nn.BatchNorm2d)
        return layer(inputs, outputs, kernel, stride=stride, padding=padding), norm(outputs), nn.ReLU()

    def head():
        return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))

    sounds = nn.Sequential(
        *convolution(1, 64, (3, 3), padding=1), nn.Identity(),  # a pool of one pixel
        *convolution(64, 192, (3, 3), padding=1), nn.MaxPool2d(3, stride=(1, 2)),
        *convolution(192, 384, (3, 3), padding=1),
        *convolution(384, 256, (3, 3), padding=1),
        *convolution(256, 256, (3, 3), padding=1), nn.MaxPool2d(3, stride=2),
        *convolution(256, 512, (5, 4)),
    )  # fmt: skip
    lips = nn.Sequential(
        *convolution(3, 96, (5, 7, 7), stride=(1, 2, 2)), nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2)),
        *convolution(96, 256, (1, 5, 5), stride=(1, 2, 2), padding=(0, 1, 1)), nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        *convolution(256, 256, (1, 3, 3), padding=(0, 1, 1)),
        *convolution(256, 256, (1, 3, 3), padding=(0, 1, 1)),
        *convolution(256, 256, (1, 3, 3), padding=(0, 1, 1)), nn.MaxPool3d((1, 3, 3), stride=(1, 2, 2)),
        *convolution(256, 512, (1, 6, 6)),
    )  # fmt: skip
    return nn.ModuleDict({"netcnnaud": sounds, "netfcaud": head(), "netcnnlip": lips, "netfclip": head()})


def lips(network: Any, crops: UInt8[np.ndarray, "N 224 224 3"]) -> Float32[np.ndarray, "M 1024"]:
    """Embeddings of all windows of WINDOW frames, M = N - 4: the network has no other extent in time, so that one pass has them all."""
    frames = weights.pixels(crops[..., ::-1]).transpose(0, 1)[None]  # [1,3,N,224,224]
    return network["netfclip"](network["netcnnlip"](frames)[0, :, :, 0, 0].T).cpu().numpy()


def sounds(network: Any, cepstrum: Float[np.ndarray, "T 13"], windows: int) -> Float32[np.ndarray, "M 1024"]:
    """Embeddings of the first M = `windows` windows, one to a frame, of as long as WINDOW frames."""
    import torch

    starts = np.lib.stride_tricks.sliding_window_view(cepstrum.astype(np.float32), WINDOW * STEPS, axis=0)[::STEPS][:windows]  # [M,13,20]
    parts = (torch.from_numpy(part.copy())[:, None].to(weights.device()) for part in weights.batches(starts, 16 * weights.BATCH))
    return np.concatenate([network["netfcaud"](network["netcnnaud"](part).flatten(1)).cpu().numpy() for part in parts])


def distances(lips: Float[np.ndarray, "N D"], sounds: Float[np.ndarray, "N D"]) -> Float[np.ndarray, " offsets"]:
    """Mean distance of lips n to sounds n + k over all n, for each k of -SHIFT..SHIFT; sounds beyond the ends are zeros."""
    padded = np.pad(sounds, ((SHIFT, SHIFT), (0, 0)))
    return np.array([np.linalg.norm(lips - padded[start : start + len(lips)], axis=1).mean() for start in range(2 * SHIFT + 1)])
