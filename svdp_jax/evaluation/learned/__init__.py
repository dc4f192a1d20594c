"""Metrics that look through networks, with weights that the user supplies in a folder. `interface` says how they are used; PyTorch
and onnxruntime are imported when a metric is made, and not before."""

from svdp_jax.evaluation.learned.csim import Csim
from svdp_jax.evaluation.learned.fvd import Fvd
from svdp_jax.evaluation.learned.gaze import Gaze
from svdp_jax.evaluation.learned.interface import AUDIO_RATE, Chunk, Clip, Metric, Needed, Outcome
from svdp_jax.evaluation.learned.lpips import Lpips
from svdp_jax.evaluation.learned.sync import Sync

__all__ = ["AUDIO_RATE", "METRICS", "Chunk", "Clip", "Metric", "Needed", "Outcome"]

METRICS: dict[str, type[Metric]] = {metric.name: metric for metric in (Lpips, Fvd, Csim, Sync, Gaze)}
