"""The demo: rendered portraits, from scratch, on one GPU. Clips of 16 + 3 frames, behind the single frames of `demo_frames.py`.

Data      python -m svdp_jax.data.synthetic --output data/rendered --pairs 4800 --validation-pairs 64
Command   python train.py --config configs/demo_frames.py --workdir runs/frames --model.dtype bfloat16
          python train.py --config configs/demo.py --workdir runs/demo --train.init-from runs/frames --model.dtype bfloat16
Hardware  one H200, of which 14 GB are used; 16 cores for the data, and 12 GB of memory
Time      data 2.6 min; 0.035 s a step of single frames, 0.043 s of clips: 2.4 min and 1.1 min, and as much again to start
Result    svdp_jax/assets/demo/README.md

It computes in float32 where nothing else is said, so that the bundled weights are sampled so on CPUs, which are slow in bfloat16.
Noise is high in training (`time_shift`), because the first step from pure noise decides the pose: the card has what it brought.
"""

from svdp_jax.config import AutoencoderConfig, Config, DataConfig, LevelConfig, ModelConfig, SampleConfig, TrainConfig

CHANNELS = 32

config = Config(
    name="demo",
    model=ModelConfig(
        width=256, depth=8, heads=4, dual_blocks=0, patch=2, latent_channels=CHANNELS, text_tokens=2, text_width=16, pooled_width=16,
        table_size=24, position_step=10.0, frame_frequencies=16, temporal_gate=0.0, prediction="x0", dtype="float32",
    ),
    autoencoder=AutoencoderConfig(kind="linear", latent_channels=CHANNELS, patch=8, scale=0.8, shift=0.0),
    data=DataConfig(path="data/rendered", size=128, frames=16, history=3, cache=True),
    train=TrainConfig(
        batch=16, steps=1_500, history_from_step=0, stage1=LevelConfig(nothing=0.05, source=0.05, driving=0.9),
        stage2=LevelConfig(nothing=0.05, source=0.05, driving=0.4, history=0.5), time_shift=30.0,
        learning_rate=1e-3, learning_rate_new=1e-3, warmup=100, decay=1.0, beta2=0.99, ema=0.999, remat="none",
    ),
    sample=SampleConfig(steps=1, guidance=(1.0, 1.0, 1.0), shift=30.0),
)
