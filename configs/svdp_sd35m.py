"""The paper's run: Stable Diffusion 3.5 Medium fine-tuned whole on cross-identity pairs, 576x576, 16 + 3 frames.

Command   python train.py --config configs/svdp_sd35m.py --workdir DIR --data.path CLIPS
Hardware  the paper used 32 H100; one sample per device and step
Time      50,000 steps, the last 10,000 with history
Result    not run here: it needs the pretrained weights and a corpus of real clips
"""

from svdp_jax.config import Config

config = Config(name="svdp_sd35m")
