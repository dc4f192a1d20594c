"""The same network and the same four-pass step, written plainly in PyTorch: what `benchmarks/sampler.py --against-pytorch` runs beside ours.

Needs torch, numpy and einops. Attention is `scaled_dot_product_attention`; everything else is left to `torch.compile`, one layer at a time, as is usual
for networks of many equal layers.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.nn.attention import SDPBackend, sdpa_kernel

# Which kernels `scaled_dot_product_attention` may take: what PyTorch chooses by itself, or one kind.
KERNELS = {
    "default": contextlib.nullcontext,
    "flash": functools.partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION),
    "cudnn": functools.partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION),
}
EPSILON = 1e-6
FLOAT32_PARTS = ("time", "pooled", "frame_encoding")  # embeddings, in float32 whatever the dtype of the rest


class Inputs(NamedTuple):
    """Of one pass; a signal that is None is left out."""

    source: torch.Tensor | None  # [B, h, w, C]
    driving: torch.Tensor | None  # [B, F, h, w, C]
    history: torch.Tensor | None  # [B, P, h, w, C]


class Reference:
    """The network of `svdp_jax.models.transformer`, from its parameters as nested dicts of tensors, and its `Constants` of tensors."""

    def __init__(self, model: Any, params: dict, constants: Any, *, dtype: torch.dtype, device: str):
        self.model, self.dtype, self.device = model, dtype, device
        groups = [("dual", model.dual_blocks), ("plain", model.depth - model.dual_blocks - 1), ("last", 1)]
        self.layers = []
        for kind, count in groups:
            for number in range(count):
                own = params[kind] if kind == "last" else _map(lambda leaf, number=number: leaf[number], params[kind])
                self.layers.append((kind, self._weights(own)))
        rest = {name: part for name, part in params.items() if name not in dict(groups)}
        self.parts = {name: self._weights(part, torch.float32 if name in FLOAT32_PARTS else dtype) for name, part in rest.items()}
        self.positions = self._tensor(constants.positions, dtype)
        self.text, self.pooled = self._tensor(constants.text, dtype), self._tensor(constants.pooled, torch.float32)

    def _tensor(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return tensor.to(self.device, dtype)

    def compile(self) -> None:
        """A graph for each kind of layer and each pass, which all layers of the kind share, and the head."""
        torch._dynamo.config.recompile_limit = 64  # graphs of one function: three kinds times four passes
        self.layer, self.head = (torch.compile(part, dynamic=False) for part in (self.layer, self.head))

    def _weights(self, tree: dict, dtype: torch.dtype | None = None) -> dict:
        """Kernels [inputs..., outputs...] as [outputs, inputs], which is what F.linear takes. Scales of norms stay in float32."""
        found = {}
        for name, leaf in tree.items():
            if isinstance(leaf, dict):
                found[name] = self._weights(leaf, dtype)
            elif name == "kernel":
                outputs = tree["bias"].numel()
                found[name] = self._tensor(leaf.reshape(-1, outputs).T, dtype or self.dtype).contiguous()
            else:
                found[name] = self._tensor(leaf.reshape(-1), torch.float32 if name.endswith("norm") else dtype or self.dtype)
        return found

    def __call__(self, z: torch.Tensor, t: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """z [B, F, h, w, C] and t [B] to the network's output, in float32."""
        model, parts = self.model, self.parts
        batch, frames, height, _, _ = z.shape
        embed = lambda x: linear(parts["patches"], rearrange(x.to(self.dtype), "... (h p) (w q) c -> ... (h w) (p q c)", p=model.patch, q=model.patch))
        image = [embed(z) + self.positions[0]]
        if inputs.source is not None:
            image.append((embed(inputs.source) + self.positions[1])[:, None].expand_as(image[0]))
        if inputs.driving is not None:
            image.append(embed(inputs.driving) + self.positions[2])
        count = image[0].shape[2]
        image = torch.cat(image, dim=2)
        words = linear(parts["text"], self.text)
        text = words.expand(batch, frames, *words.shape).contiguous()  # as the layers put it out: they share a graph
        pooled = embedding(parts["pooled"], self.pooled)
        clock = lambda t: embedding(parts["time"], sinusoid(1000.0 * t, 128)) + pooled
        number = lambda first, last: embedding(parts["frame_encoding"], sinusoid(torch.arange(first, last, device=self.device), model.frame_frequencies))
        c, code = clock(t), number(0, frames)
        past = past_text = past_c = past_code = None
        if inputs.history is not None:
            length = inputs.history.shape[1]
            past, past_text = embed(inputs.history) + self.positions[0], words.expand(batch, length, *words.shape).contiguous()
            past_c, past_code = clock(torch.zeros_like(t)), number(-length, 0)
        for kind, weights in self.layers:
            text, image, past_text, past = self.layer(weights, kind, count, text, image, past_text, past, c, past_c, code, past_code)
        out = self.head(parts, image[:, :, :count].contiguous(), c)
        return rearrange(out, "... (h w) (p q c) -> ... (h p) (w q) c", h=height // model.patch, p=model.patch, q=model.patch)

    def layer(self, weights, kind: str, count: int, text, image, past_text, past, c, past_c, code, past_code):
        new, past = self.temporal(weights["temporal"], image[:, :, :count], past, c, past_c, code, past_code, asks=kind != "last")
        image = torch.cat([new, image[:, :, count:]], dim=2)
        text, image = self.joint(weights["joint"], kind, text, image, c)
        if past is not None and kind != "last":
            past_text, past = self.joint(weights["joint"], kind, past_text, past, past_c)
        return text, image, past_text, past

    def head(self, weights, image, c):
        shift, scale = self.modulation(weights["final_modulation"], c)
        return linear(weights["final"], modulate(layer_norm(image), shift, scale).to(self.dtype)).float()

    def modulation(self, weights: dict, c: torch.Tensor) -> tuple[torch.Tensor, ...]:
        chunks = linear(weights["linear"], F.silu(c).to(self.dtype))
        return tuple(part[:, None, None] for part in chunks.reshape(len(c), -1, self.model.width).unbind(1))

    def heads(self, weights: dict, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        size = self.model.width // self.model.heads
        q, k, v = linear(weights["linear"], x).reshape(*x.shape[:-1], 3, self.model.heads, size).unbind(-3)
        return rms_norm(q, weights["q_norm"]), rms_norm(k, weights["k_norm"]), v

    def temporal(self, weights, z, past, c, past_c, code, past_code, *, asks: bool):
        def asked(x, c, code):
            shift, scale, gate = self.modulation(weights["modulation"], c)
            return *self.heads(weights["qkv"], (modulate(layer_norm(x), shift, scale) + code[:, None]).to(self.dtype)), gate

        q, k, v, gate = asked(z, c, code)
        frames = z.shape[1]
        if past is not None:
            past_q, past_k, past_v, past_gate = asked(past, past_c, past_code)
            k, v = torch.cat([k, past_k], dim=1), torch.cat([v, past_v], dim=1)
            q = torch.cat([q, past_q], dim=1) if asks else q
        flat = lambda x: x.flatten(1, 2)[:, None]  # one group of all frames
        out = attention(*map(flat, (q, k, v))).reshape(q.shape)
        update = lambda x, gate, out: (x + gate * linear(weights["out"]["linear"], out.flatten(-2))).to(x.dtype)
        if past is not None and asks:
            past = update(past, past_gate, out[:, frames:])
        return update(z, gate, out[:, :frames]), past

    def joint(self, weights, kind, text, image, c):
        words = text.shape[2]
        image_mod, text_mod = self.modulation(weights["image_modulation"], c), self.modulation(weights["text_modulation"], c)
        normed = layer_norm(image)
        image_qkv = self.heads(weights["image_qkv"], modulate(normed, *image_mod[:2]).to(self.dtype))
        text_qkv = self.heads(weights["text_qkv"], modulate(layer_norm(text), *text_mod[:2]).to(self.dtype))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text_qkv, image_qkv, strict=True))
        out = attention(image_qkv[0] if kind == "last" else q, k, v)
        projected = lambda name, out: linear(weights[name]["linear"], out.flatten(-2))
        update = image_mod[2] * projected("image_out", out if kind == "last" else out[:, :, words:])
        if kind == "dual":
            update = update + image_mod[8] * projected("image_out2", attention(*self.heads(weights["image_qkv2"], modulate(normed, *image_mod[6:8]).to(self.dtype))))
        image = self.feed_forward(weights["image_mlp"], (image + update).to(image.dtype), *image_mod[3:6])
        if kind != "last":
            text = (text + text_mod[2] * projected("text_out", out[:, :, :words])).to(text.dtype)
            text = self.feed_forward(weights["text_mlp"], text, *text_mod[3:6])
        return text, image

    def feed_forward(self, weights, x, shift, scale, gate):
        hidden = F.gelu(linear(weights["wide"], modulate(layer_norm(x), shift, scale).to(self.dtype)), approximate="tanh")
        return (x + gate * linear(weights["narrow"], hidden)).to(x.dtype)


def step(network, z: torch.Tensor, t: float, t_next: float, passes: list[Inputs], coefficients: list[float], *, prediction: str) -> torch.Tensor:
    """One guided Euler step."""
    times = torch.full((len(z),), t, device=z.device)
    v = torch.zeros_like(z)
    for inputs, coefficient in zip(passes, coefficients, strict=True):
        output = network(z, times, inputs)
        v = v + coefficient * ((z - output) / t if prediction == "x0" else output)
    return z + (t_next - t) * v


def linear(weights: dict, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weights["kernel"], weights["bias"])


def embedding(weights: dict, x: torch.Tensor) -> torch.Tensor:
    return linear(weights["out"], F.silu(linear(weights["wide"], x)))


def sinusoid(numbers: torch.Tensor, frequencies: int) -> torch.Tensor:
    rate = torch.exp(-np.log(1e4) * torch.arange(frequencies, device=numbers.device, dtype=torch.float32) / frequencies)
    angle = numbers.float()[..., None] * rate
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPSILON)


def rms_norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON) * scale).to(x.dtype)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * (1 + scale) + shift


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Within groups: [B, G, S, N, H]."""
    batch = len(q)
    q, k, v = (rearrange(x, "b g s n h -> (b g) n s h") for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "(b g) n s h -> b g s n h", b=batch)


def attention_seconds(q_shape: tuple[int, ...], k_shape: tuple[int, ...], *, dtype: torch.dtype, device: str, repeats: int = 5) -> dict[str, float]:
    """Of each of KERNELS, median seconds of attention on these shapes; one that does not take them is left out."""
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for shape in (q_shape, k_shape, k_shape))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    found = {}
    for name, kernels in KERNELS.items():
        seconds = []
        try:
            with torch.inference_mode(), kernels():
                for _ in range(1 + repeats):
                    wait()
                    begun = time.perf_counter()
                    attention(q, k, v)
                    wait()
                    seconds.append(time.perf_counter() - begun)
        except RuntimeError:
            continue
        found[name] = statistics.median(seconds[1:])
    return found


def _map(function, tree: dict) -> dict:
    return {name: _map(function, leaf) if isinstance(leaf, dict) else function(leaf) for name, leaf in tree.items()}
