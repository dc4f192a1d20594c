"""The paper's run: Stable Diffusion 3.5 Medium fine-tuned whole on cross-identity pairs, 576x576, 16 + 3 frames.

Command   python train.py --config configs/svdp_sd35m.py --train.init-from weights/sd35m --workdir DIR --data.path PAIRS \
              --mesh.data -1 --mesh.fsdp 8 --mesh.strategy fsdp
Hardware  the paper used 32 H100; one sample per device and step
Time      50,000 steps, the last 10,000 with history: planned: 22 h on 32 H100, 49 h on a v5p-64 at least, if
          every step had history (docs/training.md); without, as in the first 40,000, a step does 13% less
Result    not run here: it needs the pretrained weights and a corpus of real clips
"""

from svdp_jax.config import Config

config = Config(name="svdp_sd35m")
