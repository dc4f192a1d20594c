"""Tokens: their order, where they sit on the position table, and which of them each level of conditioning keeps."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from svdp_jax.config import ConfigError, ModelConfig
from svdp_jax.models import tokens
from svdp_jax.types import Conditions


def places(side):
    """A table [side, side, 2] whose entries are their own row and column."""
    return np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), axis=-1)


def test_unpatchify_inverts_patchify():
    latents = np.random.default_rng(0).normal(size=(2, 3, 6, 10, 4)).astype(np.float32)
    rows = tokens.patchify(latents, 2)
    assert rows.shape == (2, 3, 3 * 5, 2 * 2 * 4)
    np.testing.assert_array_equal(tokens.unpatchify(rows, 2, 6, 10), latents)


def test_order_of_tokens_and_within_a_token():
    row, column, channel = np.meshgrid(np.arange(4), np.arange(6), np.arange(2), indexing="ij")
    rows = tokens.patchify(100 * row + 10 * column + channel, 2)
    np.testing.assert_array_equal(rows[0], [0, 1, 10, 11, 100, 101, 110, 111])  # channel fastest, then column, then row
    np.testing.assert_array_equal(rows[1], [20, 21, 30, 31, 120, 121, 130, 131])  # the next token is to the right
    np.testing.assert_array_equal(rows[3], [200, 201, 210, 211, 300, 301, 310, 311])


def test_z_sits_where_sd3_puts_an_image():
    z, source, driving = np.asarray(tokens.shifted_crops(places(384), 36, 36)).reshape(3, 36, 36, 2)
    np.testing.assert_array_equal(z, places(384)[174:210, 174:210])
    np.testing.assert_array_equal(source, z + 36)
    np.testing.assert_array_equal(driving, z - 36)


@pytest.mark.parametrize(("side", "rows", "columns"), [(384, 36, 36), (18, 6, 6), (12, 4, 3), (12, 3, 4), (25, 5, 2), (24, 1, 8), (9, 3, 3)])
def test_crops_never_overlap(side, rows, columns):
    crops = np.asarray(tokens.shifted_crops(places(side), rows, columns))
    taken = [{tuple(place) for place in crop} for crop in crops]
    assert [len(crop) for crop in taken] == [rows * columns] * 3
    assert not any(one & other for one, other in itertools.combinations(taken, 2))
    for crop in crops:  # row-major, like the tokens
        np.testing.assert_array_equal(crop - crop[0], places(max(rows, columns))[:rows, :columns].reshape(-1, 2))


@pytest.mark.parametrize(("side", "rows", "columns"), [(384, 129, 129), (11, 4, 4), (12, 2, 5), (12, 5, 2)])
def test_a_grid_that_leaves_the_table_is_an_error(side, rows, columns):
    with pytest.raises(ConfigError, match=f"{rows}x{columns} tokens.*leaves the position table of {side}x{side}"):
        tokens.shifted_crops(places(side), rows, columns)


def test_position_table_has_columns_first_and_steps_of_a_sixth():
    config = ModelConfig(width=16, heads=1, table_size=8)
    table = tokens.position_table(config)
    assert table.shape == (8, 8, 16) and table.dtype == np.float32
    for row, column in [(0, 0), (2, 5), (7, 1)]:
        rates = [1, 0.1, 0.01, 0.001]  # 10000^(-i/4)
        expected = [f(place / 6 * rate) for place in (column, row) for f in (np.sin, np.cos) for rate in rates]
        np.testing.assert_allclose(table[row, column], expected, atol=1e-6)


def test_each_level_keeps_a_prefix():
    levels = jnp.arange(4)
    np.testing.assert_array_equal(tokens.kept_tokens(levels, 5), [5, 10, 15, 15])
    np.testing.assert_array_equal(tokens.kept_in_time(levels, 3, 2, 5), [15, 15, 15, 25])
    np.testing.assert_array_equal(tokens.kept_in_time(levels, 3, 0, 5), [15] * 4)


def signals(batch=4):
    return Conditions(jnp.ones((batch, 1, 1, 1)), jnp.full((batch, 2, 1, 1, 1), 2.0), jnp.full((batch, 1, 1, 1, 1), 3.0))


@pytest.mark.parametrize("level", range(4))
def test_a_pass_sees_the_signals_up_to_its_level(level):
    whole = signals()
    omitted, zeroed = (tokens.at_level(whole, level, dropped=dropped) for dropped in ("omit", "zero"))
    for first, (signal, kept, zero) in enumerate(zip(whole[:3], omitted[:3], zeroed[:3], strict=True), start=1):
        assert kept is (signal if first <= level else None)
        np.testing.assert_array_equal(zero, signal if first <= level else jnp.zeros_like(signal))
    assert tokens.at_level(Conditions(whole.source), level, dropped="zero").driving is None  # what is not there stays away


def test_zeroing_goes_by_sample():
    whole = signals()
    zeroed = tokens.zero_dropped(whole._replace(level=jnp.arange(4)))
    for first, (signal, kept) in enumerate(zip(whole[:3], zeroed[:3], strict=True), start=1):
        factor = (np.arange(4) >= first).reshape(-1, *[1] * (signal.ndim - 1))
        np.testing.assert_array_equal(kept, signal * factor)
    assert zeroed.level is None, "nothing is left to be masked"
    assert tokens.zero_dropped(whole) is whole
