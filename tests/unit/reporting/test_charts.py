"""Charts: round ticks, what is drawn of long and odd curves, and texts that stay texts."""

import re

import pytest

from dpo_jax.reporting import charts
from dpo_jax.reporting.charts import Axis, Curve
from tests.helpers.html_pages import Page


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 240, [0, 50, 100, 150, 200]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-1.46, -0.37, [-1.4, -1.2, -1.0, -0.8, -0.6, -0.4]),
        (3e-7, 1e-6, [4e-7, 6e-7, 8e-7, 1e-6]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert charts.round_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (0.69314718, "0.6931"),
        (123_456.7, "123,457"),
        (1e-6, "1e-6"),
        (2.5e-5, "2.5e-5"),
        (-3e7, "-3e7"),
        (0.05, "0.05"),
    ],
)
def test_numbers(value, text):
    assert charts.number(value) == text


def test_axis_of_one_value_has_it_in_the_middle():
    assert Axis.of([5.0, 5.0]).place(5.0) == 0.5
    assert Axis.of([0.0]).place(0.0) == 0.5


def test_logarithmic_axis():
    axis = Axis.of([0.01, 100.0], is_log=True, pad=0)
    assert [axis.place(value) for value in (0.01, 1.0, 100.0)] == pytest.approx([0, 0.5, 1])
    assert axis.ticks == pytest.approx((0.01, 0.1, 1, 10, 100))
    # Of many decades, some.
    assert len(Axis.of([1e-30, 1e30], is_log=True).ticks) <= 7
    # Below a decade, round numbers.
    assert len(Axis.of([2.0, 7.0], is_log=True).ticks) >= 3


def test_logarithmic_chart_of_a_zero_is_linear():
    """A gradient of 0 is what one looks for: it is drawn."""
    drawn = charts.chart("t", [Curve("a", [(1, 0.0), (2, 1.0)])], is_log=True)
    assert "NaN" not in drawn and drawn.count("polyline") == 1


def test_long_curves_are_thinned_without_losing_their_level():
    points = [(step, float(step % 7)) for step in range(100_000)]
    few = charts.thinned(points)
    assert len(few) == charts.DRAWN
    assert all(abs(value - 3) < 0.1 for _, value in few)
    assert charts.thinned(points[:200]) == points[:200]
    assert len(charts.chart("t", [Curve("a", points, has_single_steps=True)])) < 20_000


def test_smoothed_is_the_mean_of_the_last():
    points = [(step, float(step)) for step in range(100)]
    means = charts.smoothed(points)  # over 4
    assert means[0] == (0, 0.0) and means[3] == (3, 1.5) and means[99] == (99, 97.5)


def test_spikes_do_not_set_the_scale():
    points = [(step, 1.0 + step % 2) for step in range(200)]
    points[150] = (150, 1e6)
    drawn = charts._Drawn(Curve("a", points, has_single_steps=True))
    # The mean of those around it is drawn whole, the spike itself is cut off.
    assert max(drawn.shown_values()) < 3e5


def test_exact_curve_is_drawn_as_it_is():
    points = [(step, min(step, 50) / 50) for step in range(100)]
    legend = charts.chart("lr", [Curve("lr", points, has_single_steps=True, is_exact=True)])
    assert "<b>1</b>" in legend and 'class="single' not in legend


def test_dots_have_their_values():
    drawn = charts.chart("loss", [Curve("held out", [(0, 0.7), (40, 0.5)], is_dotted=True)])
    assert drawn.count("<circle") == 2 and "<title>held out, 40: 0.5</title>" in drawn


def test_one_training_row_is_a_dot():
    drawn = charts.chart("loss", [Curve("training", [(1, 0.7)])])
    assert drawn.count("<circle") == 1


def test_chart_without_points_is_none():
    assert charts.chart("loss", []) == charts.chart("loss", [Curve("a", [])]) == ""


def test_texts_are_escaped_and_tags_match():
    evil = "<script>alert(1)</script>&\"'"
    points = [(0, 1.0), (1, 2.0)]
    curves = [Curve(evil, points), Curve(evil, points, is_dotted=True)]
    drawn = charts.chart(evil, curves, x_label=evil, note=evil)
    assert "script" not in Page(drawn).elements
    assert evil in Page(drawn).text


def test_coordinates_lie_in_the_picture():
    points = [(step, (-1) ** step * 10.0 ** (step % 9)) for step in range(50)]
    drawn = charts.chart("t", [Curve("a", points, is_dotted=True)])
    for left, down in re.findall(r'cx="([^"]+)" cy="([^"]+)"', drawn):
        assert charts.LEFT <= float(left) <= charts.RIGHT
        assert charts.TOP <= float(down) <= charts.BOTTOM
