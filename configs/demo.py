"""The demo: rendered portraits, from scratch, on a CPU."""

from svdp_jax.config import AutoencoderConfig, Config, DataConfig, LevelConfig, ModelConfig, SampleConfig, TrainConfig

CHANNELS = 32

config = Config(
    name="demo",
    model=ModelConfig(
        width=192, depth=6, heads=3, dual_blocks=0, patch=2, latent_channels=CHANNELS, text_tokens=2, text_width=16, pooled_width=16,
        table_size=18, position_step=10.0, frame_frequencies=16, temporal_gate=0.0, prediction="x0", dtype="float32",
    ),
    autoencoder=AutoencoderConfig(kind="linear", latent_channels=CHANNELS, patch=8, scale=0.8, shift=0.0),
    data=DataConfig(path="data/rendered", size=96, frames=8, history=3),
    train=TrainConfig(
        batch=2, steps=6_000, history_from_step=4_000, stage1=LevelConfig(nothing=0.05, source=0.05, driving=0.9),
        stage2=LevelConfig(nothing=0.05, source=0.05, driving=0.4, history=0.5),
        learning_rate=1e-3, learning_rate_new=1e-3, warmup=100, decay=0.25, beta2=0.99, ema=0.999, remat="none",
    ),
    sample=SampleConfig(steps=10, guidance=(1.0, 1.0, 1.0)),
)
