"""FVD on features that look at motion (Ge et al. 2024, "On the Content Bias in Fréchet Video Distance"): a VideoMAE trained on Something-Something-v2.

    16 frames [16,H,W,3] -> middle square, 256 then 224 pixels -> vision transformer -> mean over tokens, normalised [D]
    Fréchet distance between such features of all generated and of all reference videos

The transformer is written out here, so that two published files serve: the authors' ViT-g (D = 1408), and the much smaller ViT-B
(D = 768) that Hugging Face has. Figures of the two do not compare. Written after cdfvd/ of songweige/content-debiased-fvd; ViT-B's
features are those of `VideoMAEForVideoClassification` in transformers, which the tests compare. It is not used itself: its first releases
of version 5 read the published file without the biases of queries and values, and say nothing.

Not checked: the published weights, which were not at hand. Whether ViT-g's file can be read without running code in it
(weights_only) is not known; if it cannot, it is refused.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections import deque
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from svdp_jax.config import ConfigError
from svdp_jax.evaluation import frechet
from svdp_jax.evaluation.learned import weights
from svdp_jax.evaluation.learned.interface import Chunk, Clip, Needed, Outcome

WINDOW, SIZE, LOADED = 16, 224, 256  # frames; pixels of the network's input, and of the square that is made of a frame first
TUBELET, EPSILON = 2, 1e-6  # frames per token; of layer normalisation

# Hugging Face's names -> the authors'.
NAMES = (
    (r"^videomae\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^videomae\.encoder\.layer", "blocks"),
    (r"attention\.attention\.(q|v)_bias", r"attn.\1_bias"),
    (r"attention\.attention\.(q|v)(uery|alue)\.bias", r"attn.\1_bias"),
    (r"attention\.attention", "attn"),
    (r"attention\.output\.dense", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"^classifier", "head"),
)


class Sizes(NamedTuple):
    width: int
    depth: int
    heads: int
    hidden: int
    patch: int


VIT_G = Sizes(width=1408, depth=40, heads=16, hidden=6144, patch=14)


class Fvd:
    name = "fvd"
    uses = ()
    needs = (
        Needed(
            "vit_g_hybrid_pt_1200e_ssv2_ft.pth",
            "VideoMAE v2 ViT-g, the network of the FVD's authors, 4 GB",
            "https://huggingface.co/OpenGVLab/InternVideoMAE_models (mae-g)",
            "see there",
        ),
        Needed(
            "videomae-base-finetuned-ssv2",
            "VideoMAE ViT-B, a folder with config.json, preprocessor_config.json, and model.safetensors or pytorch_model.bin",
            "https://huggingface.co/MCG-NJU/videomae-base-finetuned-ssv2",
            "CC-BY-NC-4.0 (not for commercial use)",
        ),
    )  # one is enough; the first is taken if both are there

    def __init__(self, folder: pathlib.Path, *, stride: int = WINDOW):
        """`stride`: frames from the beginning of one window to that of the next."""
        weights.found(self.name, folder, (), packages=("torch",))
        large, base = self.needs
        if (folder / large.file).exists():
            path, self.sizes, mean, deviation, who = folder / large.file, VIT_G, [0.0] * 3, [1.0] * 3, "VideoMAE v2 ViT-g, as its authors use it"
        elif (folder / base.file).is_dir():
            path, self.sizes, mean, deviation = described(folder / base.file)
            who = f"VideoMAE ViT-B, not the authors' ViT-g; pixels normalised by mean {mean} and deviation {deviation}"
        else:
            raise ConfigError(f"{self.name} needs in {folder} one of: {'; '.join(map(weights.place, self.needs))}")
        self.stride = stride
        self.state = loaded(path, self.sizes)
        self.normalisation = mean, deviation
        self.features: list[np.ndarray] = []  # [2,D] of each window of all finished clips: generated, reference
        self.protocol = (
            f"Fréchet distance between features of all generated and of all reference videos ({who}). Each feature is of {WINDOW} consecutive frames at the "
            f"video's own rate; a window begins every {stride} frames, and what is left at the end is not used (the authors take one window at random from "
            f"each video). Of a frame, the middle square, {LOADED} and then {SIZE} pixels wide, bilinear, 0..1; the mean of the last tokens, layer-normalised, "
            "before the classifier. The fewer windows, the higher it comes out: compare figures of equal numbers of windows alone, and expect it far too high "
            "from fewer windows than a feature has numbers."
        )

    def begin(self, clip: Clip) -> None:
        self.frames: deque = deque(maxlen=WINDOW)  # tensors [2,3,SIZE,SIZE]
        self.number, self.of_clip = 0, []  # frames; features of windows

    def add(self, chunk: Chunk) -> None:
        import torch

        for generated, reference in zip(weights.batches(chunk.generated), weights.batches(chunk.reference), strict=True):
            for pair in torch.stack([prepared(generated), prepared(reference)], dim=1):
                self.frames.append(pair)
                self.number += 1
                if self.number >= WINDOW and (self.number - WINDOW) % self.stride == 0:
                    self.of_clip.append(features(self.state, torch.stack(list(self.frames), dim=1), self.sizes, *self.normalisation))

    def finish(self) -> Outcome:
        self.features += self.of_clip
        return Outcome({}, {"frames": self.number, "windows": len(self.of_clip), "without_a_window": int(not self.of_clip)})

    def overall(self) -> Outcome:
        """`fvd`; it needs two windows."""
        counts = {"windows": len(self.features), "feature_size": self.sizes.width}
        if len(self.features) < 2:
            return Outcome({}, counts)
        generated, reference = np.stack(self.features, axis=1)
        return Outcome({"fvd": frechet.distance(generated, reference)}, counts)


def described(folder: pathlib.Path) -> tuple[pathlib.Path, Sizes, list[float], list[float]]:
    """Of a Hugging Face folder: the file of weights, the network's sizes, and mean and deviation of its normalisation."""
    try:
        config, pictures = (json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json"))
        names = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size"
        sizes, mean, deviation = Sizes(*(config[name] for name in names)), pictures["image_mean"], pictures["image_std"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{folder}: no folder of a VideoMAE ({error}); it needs {Fvd.needs[1].what}") from error
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).exists()]
    if not files:
        raise ConfigError(f"{folder}: holds no weights; it needs {Fvd.needs[1].what}")
    return files[0], sizes, mean, deviation


def loaded(path: pathlib.Path, sizes: Sizes) -> dict[str, Any]:
    """The transformer's tensors by the authors' names, on the device."""
    state = weights.read(path)
    state = next((state[name] for name in ("model", "module") if name in state), state)
    return {name: value.float().to(weights.device()) for name, value in weights.checked(renamed(state), layout(sizes), path, unused=("head.",)).items()}


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    """A state by Hugging Face's names by the authors'; theirs stays as it is."""
    import torch

    result = {}
    for name, value in state.items():
        for pattern, name_there in NAMES:
            name = re.sub(pattern, name_there, name)
        result[name] = value
    for query in [name for name in result if name.endswith("attn.query.weight")]:
        parts = [query.replace("query", part) for part in ("query", "key", "value")]
        if all(part in result for part in parts):
            result[query.replace("query", "qkv")] = torch.cat([result.pop(part) for part in parts])
    return result


def layout(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor that is used."""
    width, hidden = sizes.width, sizes.hidden
    block = {"attn.q_bias": (width,), "attn.v_bias": (width,), "attn.qkv.weight": (3 * width, width)}
    for name, outputs, inputs in ("attn.proj", width, width), ("mlp.fc1", hidden, width), ("mlp.fc2", width, hidden):
        block |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    block |= {f"{name}.{part}": (width,) for name in ("norm1", "norm2") for part in ("weight", "bias")}
    ends = {"patch_embed.proj.weight": (width, 3, TUBELET, sizes.patch, sizes.patch), "patch_embed.proj.bias": (width,)}
    ends |= {"fc_norm.weight": (width,), "fc_norm.bias": (width,)}
    return ends | {f"blocks.{layer}.{name}": shape for layer in range(sizes.depth) for name, shape in block.items()}


def prepared(frames: UInt8[np.ndarray, "N H W 3"]) -> Any:
    """The middle square of each frame, a tensor [N,3,SIZE,SIZE] of 0..1, resized as the authors do: smoothly to LOADED pixels, then to SIZE."""
    from torch.nn.functional import interpolate

    side = min(frames.shape[1:3])
    top, left = ((length - side) // 2 for length in frames.shape[1:3])
    square = weights.pixels(frames[:, top : top + side, left : left + side]) / 255
    return interpolate(interpolate(square, size=(LOADED, LOADED), mode="bilinear", antialias=True), size=(SIZE, SIZE), mode="bilinear")


def features(state: dict[str, Any], windows: Any, sizes: Sizes, mean: list[float], deviation: list[float]) -> Float[np.ndarray, "B D"]:
    """The transformer, for windows [B,16,3,SIZE,SIZE] of 0..1."""
    import torch
    from torch.nn import functional as F

    mean, deviation = (torch.tensor(values, device=windows.device)[:, None, None] for values in (mean, deviation))
    patches = ((windows - mean) / deviation).transpose(1, 2)  # [B,3,16,SIZE,SIZE]
    stride = (TUBELET, sizes.patch, sizes.patch)
    x = F.conv3d(patches, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=stride).flatten(2).mT  # [B,S,D]
    x = x + torch.from_numpy(positions(x.shape[1], sizes.width)).to(x.device)
    for layer in range(sizes.depth):
        block = {name.removeprefix(f"blocks.{layer}."): value for name, value in state.items() if name.startswith(f"blocks.{layer}.")}
        norm = lambda x, name: F.layer_norm(x, x.shape[-1:], block[f"{name}.weight"], block[f"{name}.bias"], EPSILON)  # noqa: B023
        linear = lambda x, name: F.linear(x, block[f"{name}.weight"], block[f"{name}.bias"])  # noqa: B023
        bias = torch.cat([block["attn.q_bias"], torch.zeros_like(block["attn.v_bias"]), block["attn.v_bias"]])
        query, key, value = F.linear(norm(x, "norm1"), block["attn.qkv.weight"], bias).unflatten(-1, (3, sizes.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + linear(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2), "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")
    return F.layer_norm(x.mean(1), x.shape[-1:], state["fc_norm.weight"], state["fc_norm.bias"], EPSILON).cpu().numpy()


def positions(tokens: int, width: int) -> Float[np.ndarray, "S D"]:
    """Sines and cosines of a token's number, in turn."""
    angles = np.arange(tokens)[:, None] / np.power(10000, 2 * (np.arange(width) // 2) / width)
    return np.where(np.arange(width) % 2, np.cos(angles), np.sin(angles)).astype(np.float32)
