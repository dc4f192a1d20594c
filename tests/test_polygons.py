"""Filled polygons: their points by hand, and as many pixels as they have area."""

import numpy as np
import pytest

from svdp_jax.data import polygons

SQUARE = np.array([[[0.3, 0.3], [0.7, 0.3], [0.7, 0.7], [0.3, 0.7]]])
BLACK, WHITE = (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)


def area(points):
    """Of polygons [F, n, 2]."""
    x, y = np.moveaxis(points, -1, 0)
    return np.abs((x * np.roll(y, -1, 1) - y * np.roll(x, -1, 1)).sum(1)) / 2


def test_a_stroke_is_as_wide_as_it_should_be():
    line = polygons.xy(np.linspace(0, 1, 5), 0.5)
    np.testing.assert_allclose(polygons.stroke(line, 0.2)[0, :, 1], [0.6] * 5 + [0.4] * 5)
    np.testing.assert_allclose(polygons.stroke(line, np.linspace(0, 0.2, 5))[0, :5, 1], np.linspace(0.5, 0.6, 5))


@pytest.mark.parametrize("turn", [1, -1], ids=["clockwise", "anticlockwise"])
def test_a_positive_offset_is_outwards(turn):
    circle = polygons.ellipse(0.5, 0.4, 0.2, 0.2)[:, ::turn]
    for distance in (0.05, -0.05):
        radius = np.linalg.norm(polygons.offset(circle, distance) - (0.5, 0.4), axis=-1)
        np.testing.assert_allclose(radius, 0.2 + distance)


@pytest.mark.parametrize("closed", [True, False])
def test_a_curve_passes_through_its_control_points(closed):
    control = [(0.0, 0.0), (1.0, 0.2), (0.8, 1.0), (0.1, 0.7)]
    curve = polygons.catmull_rom(control, closed=closed)[0]
    np.testing.assert_allclose(curve[:: polygons.CURVE_STEPS], control, atol=1e-12)
    assert len(curve) == polygons.CURVE_STEPS * (4 if closed else 3) + (not closed)  # a closed one does not repeat its start
    straight = polygons.catmull_rom([(0, 0), (1, 2), (2, 4), (3, 6)], closed=False)[0]
    np.testing.assert_allclose(straight[:, 1], 2 * straight[:, 0])


@pytest.mark.parametrize("size", [32, 100, 256])
def test_a_polygon_covers_its_area_at_any_resolution(size):
    for points in (SQUARE, polygons.ellipse(0.5, 0.5, 0.3, 0.1)):
        frames = polygons.rasterise([polygons.Shape(points, WHITE)], (BLACK, BLACK), size=size, softness=1.0)
        assert frames.shape == (1, size, size, 3) and frames.dtype == np.uint8
        assert abs(frames.mean() / 255 / area(points)[0] - 1) < 0.01


def test_later_shapes_hide_earlier_ones_and_shades_stay_within_theirs():
    red, blue = (255.0, 0.0, 0.0), (0.0, 0.0, 255.0)
    everywhere = polygons.xy([0.0, 1, 1, 0], [0.0, 0, 1, 1])
    shaded = polygons.Shape(SQUARE, red, (polygons.Shape(everywhere, blue),))
    (frame,) = polygons.rasterise([polygons.Shape(everywhere, WHITE), shaded], (BLACK, BLACK), size=64, softness=1.0)
    assert (frame[32, 32] == blue).all() and (frame[5, 5] == 255).all() and (frame[32, 5] == 255).all()
