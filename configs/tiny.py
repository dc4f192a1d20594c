"""The tests' config: every part of the model at its smallest, float32, so that a test compiles and runs in seconds on a CPU.

It learns nothing worth looking at. `python train.py --config configs/tiny.py --workdir DIR --data.path DIR` shows that a
machine can run the whole loop.
"""

from svdp_jax.config import AutoencoderConfig, Config, DataConfig, LevelConfig, ModelConfig, SampleConfig, TrainConfig

CHANNELS = 6

config = Config(
    name="tiny",
    model=ModelConfig(
        width=32, depth=4, heads=2, dual_blocks=2, patch=2, latent_channels=CHANNELS, text_tokens=3, text_width=8, pooled_width=8,
        table_size=12, position_step=1.0, frame_frequencies=8, prediction="x0", dtype="float32",
    ),
    autoencoder=AutoencoderConfig(kind="linear", latent_channels=CHANNELS, patch=4, scale=1.0, shift=0.0),
    data=DataConfig(path="data/tiny", size=32, frames=4, history=2),
    train=TrainConfig(
        batch=2, steps=8, history_from_step=4, stage1=LevelConfig(), stage2=LevelConfig(nothing=0.1, source=0.1, driving=0.3, history=0.5),
        learning_rate=1e-3, learning_rate_new=1e-3, warmup=2, ema=0.9, remat="none", log_every=2, sample_every=8, checkpoint_every=4,
    ),
    sample=SampleConfig(steps=4, chunk=2),
)
