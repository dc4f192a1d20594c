"""Operations counted by hand are those of XLA, and of the paper's model at full size."""

import dataclasses

import jax
import pytest
from flax import linen as nn

from svdp_jax import train_state
from svdp_jax.config import AutoencoderConfig, Config, ModelConfig
from svdp_jax.models import flops, tokens
from svdp_jax.models.autoencoder import make_autoencoder
from svdp_jax.models.transformer import Transformer, abstract_inputs
from svdp_jax.plan import hlo

FULL = Config()
LINEAR = AutoencoderConfig(kind="linear", latent_channels=6, patch=4, scale=1.0, shift=0.0)


@pytest.mark.parametrize(
    ("level", "tflop"), [(tokens.NOTHING, 116.4), (tokens.SOURCE, 169.0), (tokens.DRIVING, 233.7), (tokens.HISTORY, 269.7)]
)
def test_passes_of_the_papers_model(level, tflop):
    count = flops.forward(FULL.model, frames=16, history=3, tokens=1296, level=level)
    assert count.total / 1e12 == pytest.approx(tflop, rel=0.005)


def test_a_zeroed_signal_costs_as_much_as_any():
    zero = dataclasses.replace(FULL.model, dropped="zero")
    count = lambda model, level: flops.forward(model, frames=16, history=3, tokens=1296, level=level)
    assert count(zero, tokens.NOTHING) == count(zero, tokens.HISTORY) == count(FULL.model, tokens.HISTORY)


def test_history_that_is_remembered_costs_its_keys_alone():
    cached = dataclasses.replace(FULL.model, history="cached")
    count = lambda model, level=tokens.HISTORY, **how: flops.forward(model, frames=16, history=3, tokens=1296, level=level, **how)
    extra = 4 * (16 * 1296) * (3 * 1296) * 1536 * 24  # z asks after history, in every layer
    assert count(cached, remembered=True).total == count(cached, tokens.DRIVING).total + extra
    assert count(cached, remembered=True).total < count(cached).total < count(FULL.model).total


def test_a_step_is_three_passes_of_every_sample():
    train = dataclasses.replace(FULL, train=dataclasses.replace(FULL.train, batch=32))
    assert flops.train_step(train, with_history=True).total / 1e12 == pytest.approx(32 * 3 * 269.7, rel=0.005)
    assert flops.train_step(train, with_history=False).total / 1e12 == pytest.approx(32 * 3 * 233.7, rel=0.005)


def xla_flops(model: ModelConfig, *, frames: int, history: int, side: int, backward: bool) -> float:
    """XLA's count of the unrolled program with plain attention, which is lowered, and never compiled."""
    inputs = abstract_inputs(model, batch=1, frames=frames, history=history, height=side, width=side)
    config = Config(model=model)
    params = nn.meta.unbox(jax.eval_shape(lambda: train_state.init_params(config, jax.random.key(0))))
    network = Transformer(model, "plain", unroll=True)
    run = lambda params, *inputs: network.apply({"params": params}, *inputs).sum()
    return jax.jit(jax.grad(run) if backward else run).lower(params, *inputs).cost_analysis()["flops"]


@pytest.mark.parametrize("temporal", ["full", "factorized"])
def test_a_forward_pass_is_as_much_as_xla_counts(temporal):
    model = dataclasses.replace(FULL.model, depth=4, dual_blocks=2, temporal=temporal)  # of full width, so that little else is done than products
    ours = flops.forward(model, frames=4, history=2, tokens=256, level=tokens.HISTORY).total
    assert ours == pytest.approx(xla_flops(model, frames=4, history=2, side=32, backward=False), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("history", [0, 3])
def test_a_full_step_is_as_much_as_xla_counts(history):
    ours = 3 * flops.forward(FULL.model, frames=16, history=history, tokens=1296, level=tokens.HISTORY if history else tokens.DRIVING).total
    theirs = xla_flops(FULL.model, frames=16, history=history, side=72, backward=True)
    print(f"{ours / 1e12:.1f} TFLOP, XLA counts {theirs / 1e12:.1f}")
    assert ours == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize(("autoencoder", "size"), [(AutoencoderConfig(channels=(8, 16, 16), blocks=2, groups=4, latent_channels=4), 32), (LINEAR, 32)], ids=["kl", "linear"])
def test_encoding_is_as_much_as_is_compiled(autoencoder, size):
    model = make_autoencoder(autoencoder)
    frames = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), frames))
    module = hlo.Module(jax.jit(lambda params, frames: model.apply(params, frames, method="encode")).lower(params, frames).compile().as_text())
    found = sum(module.flops(where, op) * times for where, op, times in module.walk())
    assert flops.encode(autoencoder, size).total == pytest.approx(found, rel=1e-6)
