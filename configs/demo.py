"""The demo: rendered portraits, from scratch, on two CPU cores.

Data      python -m svdp_jax.data.synthetic --output data/rendered --pairs 1600 --validation-pairs 64
Command   python train.py --config configs/demo.py --workdir runs/demo --data.cache \\
              --data.frames 1 --data.history 0 --train.batch 8 --train.steps 8000 --train.stop-at 3000     single frames
          python train.py --config configs/demo.py --workdir runs/demo --data.cache                          8 + 3 frames
Hardware  2 cores of an AMD EPYC; docs/training.md has two allocator settings that make a step 1.6 times as fast
Time      25 + 13 minutes, on cores shared with other work
Result    svdp_jax/assets/demo/README.md
"""

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
        batch=2, steps=3_850, history_from_step=3_000, stage1=LevelConfig(nothing=0.05, source=0.05, driving=0.9),
        stage2=LevelConfig(nothing=0.05, source=0.05, driving=0.4, history=0.5),
        learning_rate=1e-3, learning_rate_new=1e-3, warmup=100, decay=0.3, beta2=0.99, ema=0.999, remat="none",
    ),
    sample=SampleConfig(steps=4, guidance=(1.0, 1.0, 1.0)),
)
