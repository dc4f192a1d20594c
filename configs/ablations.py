"""The paper's questions, at a size of which a CPU trains dozens: rendered portraits of 64 x 64, windows of 8 + 3 frames.

Command   python benchmarks/ablations.py --workdir runs/ablations
Hardware  2 cores of an AMD EPYC
Result    docs/method.md
"""

from svdp_jax.config import AutoencoderConfig, Config, DataConfig, LevelConfig, ModelConfig, SampleConfig, TrainConfig

CHANNELS = 32

config = Config(
    name="ablations",
    model=ModelConfig(
        width=96, depth=4, heads=3, dual_blocks=0, patch=2, latent_channels=CHANNELS, text_tokens=2, text_width=16, pooled_width=16,
        table_size=12, position_step=10.0, frame_frequencies=16, temporal_gate=0.0, prediction="x0", dtype="float32",
    ),
    autoencoder=AutoencoderConfig(kind="linear", latent_channels=CHANNELS, patch=8, scale=0.8, shift=0.0),
    data=DataConfig(size=64, frames=8, history=3, cache=True),
    train=TrainConfig(
        batch=4, steps=4000, history_from_step=3000, stage1=LevelConfig(nothing=0.05, source=0.05, driving=0.9),
        stage2=LevelConfig(nothing=0.05, source=0.05, driving=0.4, history=0.5), time_shift=30.0,
        learning_rate=2e-3, learning_rate_new=2e-3, warmup=100, decay=0.3, beta2=0.99, ema=0.995, remat="none",
        log_every=200, sample_every=100_000, checkpoint_every=500,
    ),
    sample=SampleConfig(steps=2, guidance=(1.0, 1.0, 1.0), shift=30.0),
)
