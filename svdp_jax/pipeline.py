"""Source image and driving frames to animated frames: the one natural pass (SVDP, Figure 2).

    source [H,W,3] bytes, driving [N,H,W,3] bytes (black but for eyes, nose, mouth)  ->  frames [N,H,W,3] bytes, window by window

Encode, roll out, decode. Files, faces and crops are `data.inputs`; what happens inside a window is `sampler`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, UInt8

from svdp_jax import sampler, train_state
from svdp_jax.config import Config, SampleConfig
from svdp_jax.models.autoencoder import make_autoencoder, to_bytes, to_unit
from svdp_jax.types import Frozen


def animate(
    config: Config,
    params: Any,
    frozen: Frozen,
    source: UInt8[np.ndarray, "H W 3"],
    driving: Iterable[UInt8[np.ndarray, "H W 3"]],
    key: Key[Array, ""],
    *,
    sample: SampleConfig | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> Iterator[UInt8[np.ndarray, "n H W 3"]]:
    """Yields the frames of each window; over all windows, exactly as many as `driving` has.

    `driving` is consumed as it is needed, so its length is no matter of memory. `progress` is called with the denoising
    steps that are done.
    """
    encode, decode = make_coders(config, frozen)
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
        progress=progress,
    )
    for window in latents:
        yield np.asarray(decode(window)[0])[: lengths[-1]]


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
    result = np.concatenate(list(animate(config, params, frozen, source, driving, jax.random.key(config.train.seed))))
    times = np.linspace(0, len(driving) - 1, min(columns, len(driving))).astype(int)
    rows = [np.concatenate([margin, *frames[times]], axis=1) for margin, frames in ((source, driving), (source, result), (source, target))]
    return np.concatenate(rows, axis=0)
