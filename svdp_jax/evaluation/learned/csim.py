"""CSIM: whether it is still the same person. Cosines of ArcFace embeddings (Deng et al. 2019), InsightFace's w600k_r50.

    frame, landmarks -> five points -> turned, scaled and moved onto ArcFace's template, 112 pixels -> ResNet-50 -> [512]

Written after insightface's face_align.py and arcface_onnx.py; the alignment is scikit-image's SimilarityTransform, which they use, to 1e-13.
Not checked: the published network, which was not at hand, and how much five points of landmarks differ from those of InsightFace's own
detector, which figures elsewhere were measured with. One whose batch is fixed is given one face at a time.
"""

from __future__ import annotations

import pathlib
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from svdp_jax.data import faces
from svdp_jax.evaluation.learned import weights
from svdp_jax.evaluation.learned.interface import Chunk, Clip, Needed, Outcome

SIZE = 112
# Eye, eye, tip of the nose, corner, corner of the mouth; first those on the left of the picture, which are the person's right.
TEMPLATE = np.array([(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)])
NOSE_AND_MOUTH = {68: [30, 48, 54], 478: [4, 61, 291]}  # MediaPipe's 4 is half-way from eyes to mouth, as the template's tip is; its 1 is lower


class Csim:
    name = "csim"
    uses = ("landmarks",)
    needs = (
        Needed(
            "w600k_r50.onnx",
            "InsightFace's ArcFace ResNet-50, from buffalo_l",
            "https://github.com/deepinsight/insightface/tree/master/model_zoo",
            "for non-commercial research only",
        ),
    )
    protocol = (
        "Cosine of the ArcFace embeddings (w600k_r50) of two faces, each aligned by the similarity transform that takes five points (the middles of the eyes, "
        "the tip of the nose, the corners of the mouth), from landmarks, nearest to ArcFace's template of 112 pixels; of each generated frame to the source "
        "image where there is one (cross-reenactment), else to the reference frame of the same number (self-reenactment). The mean over the frames of a clip "
        "in which both faces were found; the others are counted."
    )

    def __init__(self, folder: pathlib.Path):
        (path,) = weights.found(self.name, folder, self.needs, packages=("onnxruntime",))
        self.session = session(path)

    def begin(self, clip: Clip) -> None:
        self.similarities: list[np.ndarray] = []
        self.counts = {"frames": 0, "generated_without_face": 0, "reference_without_face": 0}
        self.cross, self.source = clip.source is not None, None
        if self.cross:
            self.counts = {"frames": 0, "generated_without_face": 0, "source_without_face": int(clip.source_landmarks is None)}
            if clip.source_landmarks is not None:
                self.source = embeddings(self.session, aligned(clip.source, clip.source_landmarks)[None])

    def add(self, chunk: Chunk) -> None:
        generated = list(zip(chunk.generated, chunk.generated_landmarks, strict=True))
        self.counts["frames"] += len(generated)
        self.counts["generated_without_face"] += sum(landmarks is None for _, landmarks in generated)
        if self.cross:
            pairs = [(face, None) for face in generated if face[1] is not None and self.source is not None]
        else:
            reference = list(zip(chunk.reference, chunk.reference_landmarks, strict=True))
            self.counts["reference_without_face"] += sum(landmarks is None for _, landmarks in reference)
            pairs = [pair for pair in zip(generated, reference, strict=True) if pair[0][1] is not None and pair[1][1] is not None]
        for part in weights.batches(pairs):
            made = embeddings(self.session, np.stack([aligned(*face) for face, _ in part]))
            true = self.source if self.cross else embeddings(self.session, np.stack([aligned(*face) for _, face in part]))
            self.similarities.append((made * true).sum(-1))

    def finish(self) -> Outcome:
        values = np.concatenate([*self.similarities, np.empty(0)])
        return Outcome({"csim": float(values.mean())} if len(values) else {}, self.counts)

    def overall(self) -> Outcome:
        return Outcome({}, {})


def session(path: pathlib.Path) -> Any:
    """The network, on CUDA where onnxruntime has it. ConfigError where the file is none."""
    import onnxruntime

    providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # onnxruntime's own have no common ancestor
        raise weights.unreadable(path, error) from error


def embeddings(session: Any, crops: UInt8[np.ndarray, "N 112 112 3"]) -> Float32[np.ndarray, "N D"]:
    """Unit vectors, one for each face."""
    given = session.get_inputs()[0]
    parts = weights.batches(((crops.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2), 1 if isinstance(given.shape[0], int) else weights.BATCH)
    vectors = np.concatenate([session.run(None, {given.name: part})[0] for part in parts])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def aligned(frame: UInt8[np.ndarray, "H W 3"], landmarks: Float32[np.ndarray, "K 2"]) -> UInt8[np.ndarray, "112 112 3"]:
    """The face as ArcFace learnt to see it; black beyond the frame."""
    return cv2.warpAffine(frame, similarity(five_points(landmarks), TEMPLATE), (SIZE, SIZE))


def five_points(landmarks: Float32[np.ndarray, "K 2"]) -> Float[np.ndarray, "5 2"]:
    """The points of the template in a face."""
    left_eye, right_eye, _, _ = faces.centres(landmarks)
    return np.stack([right_eye, left_eye, *landmarks[NOSE_AND_MOUTH[len(landmarks)]]]).astype(np.float64)


def similarity(points: Float[np.ndarray, "N 2"], target: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "2 3"]:
    """The rotation, scaling and translation, as a matrix for (x, y, 1), that bring points nearest to target in the least squares."""
    source, goal = (x[:, 0] + 1j * x[:, 1] for x in (points, target))
    centred = source - source.mean()
    turn = np.vdot(centred, goal) / np.vdot(centred, centred)  # vdot conjugates its first
    move = goal.mean() - turn * source.mean()
    return np.array([[turn.real, -turn.imag, move.real], [turn.imag, turn.real, move.imag]])
