"""Source image and driving frames to animated frames: the one natural pass (SVDP, Figure 2).

    source [H,W,3] bytes, driving [N,H,W,3] bytes (black but for eyes, nose, mouth)  ->  frames [N,H,W,3] bytes, window by window

Encode, roll out, decode. Files, faces and crops are `data.inputs`; what happens inside a window is `sampler`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Key, UInt8

from svdp_jax import sampler, train_state
from svdp_jax.config import Config, SampleConfig
from svdp_jax.models.autoencoder import make_autoencoder, to_bytes, to_unit
from svdp_jax.types import Frozen


class Window(NamedTuple):
    """A finished window: what is shown of it, and what the next one needs."""

    number: int  # from 0
    frames: UInt8[np.ndarray, "n H W 3"]  # F of them, but for a last window
    history: Float32[np.ndarray, "P h w C"]  # its last latents


def animate(
    config: Config,
    params: Any,
    frozen: Frozen,
    source: UInt8[np.ndarray, "H W 3"],
    driving: Iterable[UInt8[np.ndarray, "H W 3"]],
    key: Key[Array, ""],
    *,
    sample: SampleConfig | None = None,
    after: Window | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> Iterator[Window]:
    """Yields one window after the other; together they have exactly as many frames as `driving`.

    `driving` is consumed as it is needed, so its length is no matter of memory. With `after`, the last window of an earlier
    call, it begins behind that window's frames, and what comes is to the bit what that call would have yielded. `progress` is
    called with the denoising steps that are done.
    """
    encode, decode = make_coders(config, frozen)
    first = after.number + 1 if after else 0
    lengths: list[int] = []  # frames of each window that count

    def encoded_windows():
        for window in full_windows(driving, config.data.frames):
            lengths.append(len(window))
            padding = [window[-1]] * (config.data.frames - len(window))
            yield encode(jnp.asarray(np.stack(window + padding)[None]))

    latents = sampler.roll_out(
        train_state.make_transformer(config),
        params,
        train_state.constants_of(config, frozen),
        encode(jnp.asarray(source[None])),
        encoded_windows(),
        key,
        sample=sample or config.sample,
        history=config.data.history,
        first=first,
        past=jnp.asarray(after.history[None]) if after and config.data.history else None,
        progress=progress,
    )
    for number, window in enumerate(latents, start=first):
        history = np.asarray(window[0, len(window[0]) - config.data.history :])
        yield Window(number, np.asarray(decode(window)[0])[: lengths[-1]], history)


def make_coders(config: Config, frozen: Frozen) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Compiled: frames [..., H, W, 3] in bytes -> latents [..., h, w, C], and latents -> frames."""
    autoencoder, params = make_autoencoder(config.autoencoder), {"params": frozen.autoencoder}
    encode = jax.jit(lambda frames: autoencoder.apply(params, to_unit(frames), method="encode"))
    decode = jax.jit(lambda latents: to_bytes(autoencoder.apply(params, latents, method="decode")))
    return encode, decode


def full_windows(frames: Iterable[UInt8[np.ndarray, "H W 3"]], size: int) -> Iterator[list[UInt8[np.ndarray, "H W 3"]]]:
    """Runs of `size` consecutive frames; the last may be shorter."""
    window: list[np.ndarray] = []
    for frame in frames:
        window.append(frame)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def contact_sheet(
    config: Config,
    params: Any,
    frozen: Frozen,
    source: UInt8[np.ndarray, "H W 3"],
    driving: UInt8[np.ndarray, "N H W 3"],
    target: UInt8[np.ndarray, "N H W 3"],
    *,
    columns: int = 8,
) -> UInt8[np.ndarray, "HH WW 3"]:
    """A picture of one clip: driving, result and truth, one below the other, at `columns` times; the source stands left."""
    result = np.concatenate([window.frames for window in animate(config, params, frozen, source, driving, jax.random.key(config.train.seed))])
    times = np.linspace(0, len(driving) - 1, min(columns, len(driving))).astype(int)
    rows = [np.concatenate([margin, *frames[times]], axis=1) for margin, frames in ((source, driving), (source, result), (source, target))]
    return np.concatenate(rows, axis=0)
