"""The demo's first part: single frames, which teach drawing and the driver's pose at a twentieth of a clip's cost. `demo.py` has the commands."""

import dataclasses
import pathlib

from svdp_jax.config import load_config

_demo = load_config(pathlib.Path(__file__).with_name("demo.py"))

config = dataclasses.replace(
    _demo,
    name="demo_frames",
    data=dataclasses.replace(_demo.data, frames=1, history=0),
    train=dataclasses.replace(_demo.train, batch=256, steps=4_146, learning_rate=1.5e-3, learning_rate_new=1.5e-3, warmup=500, decay=0.0),
)
