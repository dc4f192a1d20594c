"""Every knob of svdp_jax: frozen dataclasses, checked when they are built.

A run is one `Config`; each file in `configs/` builds one. Units stand beside the field. An impossible value raises
`ConfigError`, whose message names the field, the value and what would work.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import pathlib
import re
from typing import Any, Literal, get_type_hints


class ConfigError(Exception):
    """A field has a value that cannot work. The command lines print it as one line and exit with status 2.

    No ValueError: tyro takes that for a value of the wrong type.
    """


def _check(holds: bool, field: str, value: Any, problem: str) -> None:
    if not holds:
        raise ConfigError(f"{field}={value} {problem}")


def _positive(config: Any, names: str) -> None:
    for name in names.split():
        _check(getattr(config, name) > 0, f"{type(config).__name__.removesuffix('Config').lower()}.{name}", getattr(config, name), "must be positive")


def _choices(config: Any) -> None:
    for name, hint in get_type_hints(type(config)).items():
        allowed = getattr(hint, "__args__", ()) if getattr(hint, "__origin__", None) is Literal else ()
        if allowed:
            _check(
                getattr(config, name) in allowed,
                f"{type(config).__name__.removesuffix('Config').lower()}.{name}",
                getattr(config, name),
                f"must be one of {', '.join(allowed)}",
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The transformer. The defaults are Stable Diffusion 3.5 Medium's sizes."""

    width: int = 1536
    depth: int = 24
    heads: int = 24
    dual_blocks: int = 13  # the first blocks have a second, image-only attention
    mlp_ratio: int = 4
    patch: int = 2  # latents per token, along each side
    latent_channels: int = 16
    text_tokens: int = 154
    text_width: int = 4096
    pooled_width: int = 2048
    table_size: int = 384  # side of the position table, in tokens
    position_step: float = 1 / 6  # distance of neighbouring tokens in the sin-cos formula of the table
    frame_frequencies: int = 128  # sinusoids that encode a frame number
    temporal: Literal["full", "factorized"] = "full"
    temporal_gate: float = 0.0  # initial gate of the temporal blocks; 0 leaves the trunk as it is
    history: Literal["joint", "cached"] = "joint"  # history attends, too; or is only attended to, so that a window needs its keys and values once
    dropped: Literal["omit", "zero"] = "omit"  # a dropped signal leaves the sequence, or stays as zeros
    prediction: Literal["velocity", "x0"] = "velocity"  # what the network puts out
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of matrix products; norms, softmax and flow are float32

    def __post_init__(self):
        _positive(self, "width depth heads mlp_ratio patch latent_channels text_tokens text_width pooled_width table_size")
        _positive(self, "frame_frequencies position_step")
        _choices(self)
        _check(self.width % self.heads == 0, "model.heads", self.heads, f"must divide model.width={self.width}")
        _check(self.width % 4 == 0, "model.width", self.width, "must be a multiple of 4 (two axes, sine and cosine)")
        _check(
            0 <= self.dual_blocks < self.depth, "model.dual_blocks", self.dual_blocks, "must be at least 0 and less than model.depth (the last block is plain)"
        )

    @property
    def head_size(self) -> int:
        return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Frames to latents and back. `kl` is SD3's autoencoder; `linear` a PCA of patches for small models from scratch."""

    kind: Literal["kl", "linear"] = "kl"
    latent_channels: int = 16
    channels: tuple[int, ...] = (128, 256, 512, 512)  # kl: width of each resolution; linear: unused
    blocks: int = 2  # kl: residual blocks per resolution
    groups: int = 32  # kl: groups of each group norm
    patch: int = 8  # linear: pixels per latent, along each side
    scale: float = 1.5305  # latents = (z - shift) * scale
    shift: float = 0.0609

    def __post_init__(self):
        _positive(self, "latent_channels blocks groups patch scale")
        _choices(self)
        for channels in self.channels:
            _check(channels % self.groups == 0, "autoencoder.channels", self.channels, f"must each be a multiple of autoencoder.groups={self.groups}")

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along each side."""
        return self.patch if self.kind == "linear" else 2 ** (len(self.channels) - 1)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Clips and what is cut from them."""

    path: str = ""  # directory of a record dataset (see data/clips.py)
    size: int = 576  # pixels, height and width of a frame
    frames: int = 16  # F, frames of a window
    history: int = 3  # F', frames of the last window that the next one sees; 0: windows know nothing of each other
    fps: float = 25.0
    face_scale: float = 2.3  # side of the crop, in sides of the face box
    driver_mask: bool = True  # of the driver, only eyes, nose and mouth are seen; False shows the model all of it, looks and background too
    region_margin: float = 0.06  # around eyes, nose and mouth, in sides of the face box
    region_jitter: float = 0.0  # in training: standard deviation of each edge of a window's regions, in sides of the face box
    corrupt_limit: float = 0.01  # share of the records that may be corrupt or too short; they are left out
    workers: int = 0  # processes that decode, with cache only once; 0 uses threads
    cache: bool = False  # keep clips in memory as the model sees them: for data sets that fit

    def __post_init__(self):
        _positive(self, "size frames fps face_scale")
        _check(self.region_margin >= 0, "data.region_margin", self.region_margin, "must not be negative")
        _check(self.region_jitter >= 0, "data.region_jitter", self.region_jitter, "must not be negative")
        _check(0 <= self.corrupt_limit <= 1, "data.corrupt_limit", self.corrupt_limit, "must be a share, 0 to 1")
        _check(self.workers >= 0, "data.workers", self.workers, "must not be negative")
        _check(0 <= self.history < self.frames, "data.history", self.history, f"must be 0 to {self.frames - 1}: history comes from one window")


@dataclasses.dataclass(frozen=True)
class LevelConfig:
    """Probability of each level of conditioning in training; each level contains the one before."""

    nothing: float = 0.1  # u
    source: float = 0.1  # s
    driving: float = 0.8  # d
    history: float = 0.0  # p

    def __post_init__(self):
        _check(min(self.probabilities) >= 0, "levels", self.probabilities, "must not be negative")
        _check(abs(sum(self.probabilities) - 1) < 1e-6, "levels", self.probabilities, "must add up to 1")

    @property
    def probabilities(self) -> tuple[float, float, float, float]:
        return self.nothing, self.source, self.driving, self.history


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Optimisation and its two stages: history is off before `history_from_step` and on from there.

    A model without history (`data.history=0`) has the first stage alone, whatever `history_from_step` and `stage2` say.
    """

    seed: int = 0
    init_from: str = ""  # checkpoint to start from, such as a converted Stable Diffusion 3.5 Medium; empty: from scratch
    batch: int = 32  # samples per step, over all devices
    steps: int = 50_000
    stop_at: int | None = None  # end early, on the same schedule
    history_from_step: int = 40_000
    stage1: LevelConfig = LevelConfig()
    stage2: LevelConfig = LevelConfig(nothing=0.1, source=0.1, driving=0.3, history=0.5)
    learning_rate: float = 1e-5  # of pretrained parameters
    accumulation: int = 1  # parts of a batch, done one after the other to save memory; the result is that of the whole
    learning_rate_new: float = 1e-4  # of the temporal blocks and the frame encoding
    warmup: int = 1000  # steps
    decay: float = 0.0  # share of the steps, at the end, over which the learning rate falls to 0
    weight_decay: float = 0.01  # on matrices only
    clip: float = 1.0  # global norm of the gradient
    beta2: float = 0.999
    ema: float = 0.9999  # decay of the weights to sample from; after n steps at most 1 - 9 / (10 + n): 0.9998 after 45,000
    time_shift: float = 3.0  # of the noise level t, drawn logit-normal(0, 1)
    history_noise: float = 0.0  # on history, against errors that add up from window to window: standard deviation, in latent units, up to this
    remat: Literal["none", "full", "attention", "offload"] = "full"  # what the backward pass finds, or computes again (models/transformer.py)
    log_every: int = 50  # steps
    sample_every: int = 2000
    checkpoint_every: int = 1000
    keep: int = 3  # checkpoints, the last ones
    keep_every: int = 0  # and for good those of every so many steps; 0: none
    profile: str = ""  # FIRST:LAST, steps of which a trace is written, for xprof

    def __post_init__(self):
        _positive(self, "batch accumulation steps learning_rate learning_rate_new clip time_shift log_every sample_every checkpoint_every keep")
        _choices(self)
        _check(self.keep_every >= 0, "train.keep_every", self.keep_every, "must not be negative")
        steps = re.fullmatch(r"(\d+):(\d+)", self.profile)
        _check(not self.profile or steps and 0 < int(steps[1]) <= int(steps[2]), "train.profile", self.profile, "must be FIRST:LAST, as 10:13, from step 1 on")
        _check(0 <= self.seed < 2**32, "train.seed", self.seed, "must be 0 to 2**32 - 1")  # JAX drops what is above
        _check(0 <= self.ema < 1, "train.ema", self.ema, "must be at least 0 and less than 1")
        _check(0 <= self.decay <= 1, "train.decay", self.decay, "must be a share, 0 to 1")
        _check(0 <= self.beta2 < 1, "train.beta2", self.beta2, "must be at least 0 and less than 1")
        _check(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "must not be negative")
        _check(self.stop_at is None or self.stop_at > 0, "train.stop_at", self.stop_at, "must be positive")
        _check(self.history_noise >= 0, "train.history_noise", self.history_noise, "must not be negative")
        _check(self.warmup >= 0, "train.warmup", self.warmup, "must not be negative")
        _check(
            self.stage1.history == 0,
            "train.stage1.history",
            self.stage1.history,
            "must be 0: stage 1 is trained without history; set train.history_from_step=0 to have it from the start",
        )


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The sampler's defaults; flags of sample.py override them."""

    steps: int = 40
    guidance: tuple[float, float, float] = (2.0, 2.5, 1.0)  # source, driving, history
    shift: float = 3.0
    chunk: int = 4  # denoising steps per call of the compiled program: how often progress is shown

    def __post_init__(self):
        _positive(self, "steps shift chunk")
        _check(all(map(math.isfinite, self.guidance)), "sample.guidance", self.guidance, "must be finite")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 takes what is left."""

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    strategy: Literal["dp", "fsdp", "fsdp_tensor", "fsdp_context", "fsdp_context_tensor"] = "dp"

    def __post_init__(self):
        _choices(self)
        sizes = (self.data, self.fsdp, self.context, self.tensor)
        _check(all(size == -1 or size > 0 for size in sizes) and sizes.count(-1) <= 1, "mesh", sizes, "must be positive, with at most one -1")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run: model, autoencoder, data, training, sampling, mesh."""

    name: str = "svdp_sd35m"
    model: ModelConfig = ModelConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        _check(
            self.model.latent_channels == self.autoencoder.latent_channels,
            "model.latent_channels",
            self.model.latent_channels,
            f"must equal autoencoder.latent_channels={self.autoencoder.latent_channels}",
        )
        unit = self.autoencoder.downsampling * self.model.patch
        _check(self.data.size % unit == 0, "data.size", self.data.size, f"must be a multiple of {unit} (autoencoder.downsampling x model.patch)")
        # Source and driving sit one grid further out than the centre crop, on either side.
        _check(
            self.model.table_size >= 3 * self.grid,
            "data.size",
            self.data.size,
            f"puts three crops of {self.grid} tokens on a position table of {self.model.table_size}; use at most {self.model.table_size // 3 * unit} pixels",
        )
        _check(
            self.data.frames % self.mesh.context == 0 or self.mesh.context == -1,
            "data.frames",
            self.data.frames,
            f"must be a multiple of mesh.context={self.mesh.context}",
        )

    def has_history(self, step: int) -> bool:
        """Whether this step of training, counted from 0, belongs to the second stage."""
        return self.data.history > 0 and step >= self.train.history_from_step

    def as_trained(self, step: int) -> Config:
        """The config to sample weights with that have so many steps behind them: without history where they have seen none (zeroed, they have)."""
        known = not self.data.history or self.has_history(step - 1) or self.model.dropped == "zero"
        return self if known else dataclasses.replace(self, data=dataclasses.replace(self.data, history=0))

    @property
    def profiled(self) -> range:
        """Steps of which a trace is written, counted from 1."""
        first, _, last = self.train.profile.partition(":")
        return range(int(first), int(last) + 1) if self.train.profile else range(0)

    @property
    def grid(self) -> int:
        """Tokens along each side of a frame."""
        return self.data.size // (self.autoencoder.downsampling * self.model.patch)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """h, w, C of one frame."""
        side = self.data.size // self.autoencoder.downsampling
        return side, side, self.autoencoder.latent_channels


def load_config(path: str | pathlib.Path) -> Config:
    """The `config` of a Python file (as in `configs/`), or a `config.json` that a run has written."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ConfigError(f"config {path} does not exist")
    if path.suffix == ".json":
        return read_config(path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"config {path} is neither a .py nor a .json file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, "config", None), Config):
        raise ConfigError(f"config {path} defines no `config` of type svdp_jax.config.Config")
    return module.config


def read_config(path: pathlib.Path) -> Config:
    """What a run has written to its config.json. Raises ConfigError where it is not that."""
    try:
        return from_dict(Config, json.loads(path.read_text()))
    except (json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ConfigError(f"config {path} is not what a run has written: {error}") from error


def to_dict(config: Config) -> dict[str, Any]:
    """`config` as plain dicts and lists, for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """The dataclass `cls` from what `to_dict` made of it. An unknown field raises ConfigError."""
    hints = get_type_hints(cls)
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
    _check(not unknown, cls.__name__, unknown, "are unknown fields")
    converted = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_dict(hints[name], value)
        elif isinstance(value, list):
            value = tuple(value)
        converted[name] = value
    return cls(**converted)
