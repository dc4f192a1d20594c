"""The demo: rendered portraits, from scratch, on two CPU cores.

Data      python -m svdp_jax.data.synthetic --output data/rendered --pairs 3200 --validation-pairs 64      5 min
Command   python train.py --config configs/demo.py --workdir runs/demo \\
              --data.frames 1 --data.history 0 --train.batch 8 --train.steps 60000 --train.stop-at 19500     single frames
          python train.py --config configs/demo.py --workdir runs/demo                                      8 + 3 frames
Hardware  2 cores of an AMD EPYC, 8 GB of memory; docs/training.md has settings of the allocator that make a step faster
Time      0.35 s a step for single frames, 0.85 s for clips: 1 h 55 min and 45 min. The bundled weights came to the same steps in
          six stages, as their card says; from scratch in one piece these two commands were not run.
Result    svdp_jax/assets/demo/README.md

Noise is high in training (`time_shift`), because few steps from pure noise decide the pose: the card has what it brought.
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
    data=DataConfig(path="data/rendered", size=96, frames=8, history=3, cache=True),
    train=TrainConfig(
        batch=2, steps=22_500, history_from_step=19_500, stage1=LevelConfig(nothing=0.05, source=0.05, driving=0.9),
        stage2=LevelConfig(nothing=0.05, source=0.05, driving=0.4, history=0.5), time_shift=30.0,
        learning_rate=1e-3, learning_rate_new=1e-3, warmup=100, decay=0.3, beta2=0.99, ema=0.999, remat="none",
    ),
    sample=SampleConfig(steps=2, guidance=(1.0, 1.0, 1.0), shift=30.0),
)
