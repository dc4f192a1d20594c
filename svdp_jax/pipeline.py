"""Source image and driving frames to animated frames: the one natural pass (SVDP, Figure 2).

    source [H,W,3] bytes, driving [N,H,W,3] bytes (black but for eyes, nose, mouth)  ->  frames [N,H,W,3] bytes, window by window

Encode, roll out, decode. Files, faces and crops are `data.inputs`; what happens inside a window is `sampler`.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Key, UInt8

from svdp_jax import sampler, train_state
from svdp_jax.config import Config, SampleConfig
from svdp_jax.models.autoencoder import by_parts, make_autoencoder, to_bytes, to_unit
from svdp_jax.models.transformer import computing_type
from svdp_jax.sharding import Layout
from svdp_jax.stopwatch import Stopwatch
from svdp_jax.types import Frozen

CODED_AT_ONCE = 2  # frames that go through the autoencoder together: its activations are large

Item = TypeVar("Item")


class Window(NamedTuple):
    """A finished window: what is shown of it, and what the next one needs. Arrays of the device, which may still be at work on them."""

    number: int  # from 0
    frames: UInt8[Array | np.ndarray, "*B n H W 3"]  # F of them, but for a last window
    history: Float32[Array | np.ndarray, "*B P h w C"]  # its last latents


def animate(
    config: Config,
    params: Any,
    frozen: Frozen,
    source: UInt8[np.ndarray, "H W 3"],
    driving: Iterable[UInt8[np.ndarray, "H W 3"]],
    key: Key[Array, ""],
    *,
    after: Window | None = None,
    **how: Any,
) -> Iterator[Window]:
    """`animate_batch` for one portrait, `how` as there: no array has its leading axis B."""
    if after:
        after = after._replace(frames=after.frames[None], history=after.history[None])
    batched = (frame[None] for frame in driving)
    for number, frames, history in animate_batch(config, params, frozen, source[None], batched, key, after=after, **how):
        yield Window(number, frames[0], history[0])


def animate_batch(
    config: Config,
    params: Any,
    frozen: Frozen,
    source: UInt8[np.ndarray, "B H W 3"],
    driving: Iterable[UInt8[np.ndarray, "B H W 3"]],
    key: Key[Array, ""],
    *,
    sample: SampleConfig | None = None,
    after: Window | None = None,
    layout: Layout | None = None,
    progress: Callable[[int], None] = lambda steps: None,
    watch: Stopwatch | None = None,
) -> Iterator[Window]:
    """B portraits, each by a driver of its own, all of equal length. Yields one window after the other; together they have exactly as many frames as `driving`.

    `driving` is consumed as it is needed, a window ahead, so its length is no matter of memory. With `after`, the last window of an earlier
    call, it begins behind that window's frames, and what comes is to the bit what that call would have yielded. `layout`: of several
    devices that share the frames. `progress` is called with the denoising steps that are done; `watch` takes the time of them.
    """
    encode, decode = make_coders(config, frozen, layout)
    watch = watch or Stopwatch()
    first = after.number + 1 if after else 0
    lengths: list[int] = []  # frames of each window that count

    def encoded_windows():
        for window in ahead(full_windows(driving, config.data.frames)):
            lengths.append(len(window))
            padding = [window[-1]] * (config.data.frames - len(window))
            yield encode(np.stack(window + padding, axis=1))

    latents = sampler.roll_out(
        train_state.make_transformer(config, layout=layout),
        params,
        train_state.constants_of(config, frozen),
        encode(source[:, None])[:, 0],
        encoded_windows(),
        key,
        sample=sample or config.sample,
        history=config.data.history,
        first=first,
        past=jnp.asarray(after.history) if after and config.data.history else None,
        progress=progress,
    )
    number = first
    while True:
        with watch("denoise"):
            window = next(latents, None)
            if window is None:
                return
            frames = decode(window)
        yield Window(number, frames[:, : lengths[-1]], window[:, window.shape[1] - config.data.history :])
        number += 1


def make_coders(config: Config, frozen: Frozen, layout: Layout | None = None) -> tuple[Callable[[Any], Array], Callable[[Array], Array]]:
    """Compiled: frames [B,F,H,W,3] in bytes -> latents [B,F,h,w,C], and latents -> frames."""
    coder = functools.partial(_coded, make_autoencoder(config.autoencoder), layout)
    return functools.partial(coder, "encode", frozen.autoencoder), functools.partial(coder, "decode", frozen.autoencoder)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _coded(autoencoder: nn.Module, layout: Layout | None, method: str, params: Any, x: Array) -> Array:
    """A few frames at a time, and of several devices each its own."""

    def one(x: Array) -> Array:
        if method == "encode":
            return autoencoder.apply({"params": params}, to_unit(x), method="encode")
        return to_bytes(autoencoder.apply({"params": params}, x, method="decode"))

    def some(x: Array) -> Array:
        flat = by_parts(one, x.reshape(-1, *x.shape[2:]), at_once=CODED_AT_ONCE)
        return flat.reshape(*x.shape[:2], *flat.shape[1:])

    return layout.per_frame(some)(x) if layout else some(x)


def abstract_weights(config: Config, where: Layout | jax.Device) -> Any:
    """What a checkpoint's weights are loaded into for sampling: on one device, or whole on each of several; each parameter in the type that the
    network computes in, so that it takes half of the memory, and the result is the same to the bit."""
    place = where.whole if isinstance(where, Layout) else jax.sharding.SingleDeviceSharding(where)

    def of(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, computing_type(config.model, path), sharding=place)

    return jax.tree_util.tree_map_with_path(of, train_state.abstract_params(config))


def full_windows(frames: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Runs of `size` consecutive frames; the last may be shorter."""
    window: list[Item] = []
    for frame in frames:
        window.append(frame)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The same, each fetched in another thread while the one before is in use."""
    end, iterator = object(), iter(items)
    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = reader.submit(next, iterator, end)
            yield item


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
