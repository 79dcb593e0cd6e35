"""Line charts as inline SVG: axes with round ticks, curves of training steps, dots of evaluations.

Colours and line widths are classes, which the page's style sheet gives values for light and dark.
Nothing here has an id, so that any number of charts can stand on a page.
"""

import dataclasses
import html
import itertools
import math
import statistics
from collections.abc import Iterable

COLOURS = 8  # classes c0 to c7 of the style sheet; further runs begin again
DRAWN = 240  # most points of a curve: one for every pixel and a half of a chart's width
WINDOWS = 25  # a curve's mean is over this part of its steps: smooth, and ends are not delayed much
OUTLIERS = 0.02  # share of single steps that may lie outside of the picture, half at either end

# Of the whole picture and of the field within its axes, in the picture's own units.
WIDTH, HEIGHT = 360, 214
LEFT, RIGHT, TOP, BOTTOM = 46, 352, 8, 184

Points = list[tuple[float, float]]  # (step, value)


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line of a chart, and its line in the legend."""

    label: str
    points: Points
    colour: int = 0
    is_dotted: bool = False  # a dot at each point, as of evaluations, and no mean
    has_single_steps: bool = False  # also draws each step, faintly
    is_exact: bool = (
        False  # drawn as it is, as a learning rate: there is no noise to take a mean of
    )

    @property
    def line(self) -> Points:
        """The points that are drawn as a line, and of which the legend has the last."""
        if self.is_dotted:
            return self.points
        points = thinned(self.points)
        return points if self.is_exact else smoothed(points)


def chart(
    title: str, curves: list[Curve], *, x_label: str = "step", is_log: bool = False, note: str = ""
) -> str:
    """Return a figure with a title, a legend and a picture; "" where no curve has a point.

    is_log: the values are drawn on a logarithmic axis, if all are above 0. note: a line below.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    is_log = is_log and all(y > 0 for curve in curves for _, y in curve.points)
    drawn = [_Drawn(curve) for curve in curves]
    x_axis = Axis.of((x for curve in curves for x, _ in curve.points), pad=0)
    shown = itertools.chain.from_iterable(one.shown_values() for one in drawn)
    y_axis = Axis.of(shown, is_log=is_log)
    parts = [_frame(x_axis, y_axis, x_label)]
    # A picture within the picture cuts off what lies outside of the axes.
    parts.append(
        f'<svg x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{BOTTOM - TOP}" '
        f'viewBox="{LEFT} {TOP} {RIGHT - LEFT} {BOTTOM - TOP}">'
    )
    parts += [one.lines(x_axis, y_axis) for one in drawn]
    parts.append("</svg>")
    # Dots lie on the edges too, and are not to be cut.
    parts += [one.dots(x_axis, y_axis) for one in drawn]
    escaped = html.escape(title)
    below = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return (
        f"<figure><figcaption>{escaped}</figcaption>{_legend(curves)}"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped}">'
        f"{''.join(parts)}</svg>{below}</figure>"
    )


@dataclasses.dataclass(frozen=True)
class Axis:
    """A range of values and its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_log: bool = False

    @classmethod
    def of(cls, values: Iterable[float], *, is_log: bool = False, pad: float = 0.06) -> "Axis":
        """Return an axis that shows all values, with room of `pad` of their range on both sides."""
        values = list(values)
        low, high = min(values), max(values)
        if is_log:
            low, high = math.log10(low), math.log10(high)
        if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
            # One value alone, as a constant learning rate: it lies in the middle.
            room = abs(low) * 0.5 or 0.5
            low, high = low - room, high + room
        else:
            room = pad * (high - low)
            low, high = low - room, high + room
        if is_log:
            ticks = _log_ticks(low, high)
            return cls(low, high, ticks, True)
        return cls(low, high, tuple(round_ticks(low, high)))

    def place(self, value: float) -> float:
        """Return where a value lies between the ends, 0 to 1."""
        position = math.log10(value) if self.is_log else value
        return (position - self.low) / (self.high - self.low)


def round_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return multiples of 1, 2 or 5 times a power of ten between two values, about `wanted`."""
    power = 10.0 ** math.floor(math.log10((high - low) / wanted))
    choices = []
    for factor in (1, 2, 5, 10):
        step = power * factor
        numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
        choices.append([number * step for number in numbers])
    return min(choices, key=lambda ticks: abs(len(ticks) - wanted))


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return values for the ticks of a logarithmic axis, whose ends are exponents of ten."""
    first, last = math.ceil(low), math.floor(high)
    if last - first >= 1:
        every = math.ceil((last - first + 1) / 6)
        return tuple(10.0**exponent for exponent in range(first, last + 1, every))
    # Within a decade or so: round numbers as on any other axis.
    return tuple(tick for tick in round_ticks(10**low, 10**high) if tick > 0)


def number(value: float) -> str:
    """Return a value as it is written beside an axis or in a legend; inf and nan by their names."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _tick_label(value: float) -> str:
    # A thousand examples more or less are of no interest beside an axis.
    if abs(value) >= 10_000:
        for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if abs(value) >= size:
                return f"{value / size:.4g}{unit}"
    return number(value)


def thinned(points: Points, most: int = DRAWN) -> Points:
    """Return at most so many points: means over neighbours where there are more."""
    if len(points) <= most:
        return points
    size = len(points) / most
    means = []
    for index in range(most):
        some = points[math.floor(index * size) : math.floor((index + 1) * size)]
        x = statistics.fmean(x for x, _ in some)
        y = statistics.fmean(y for _, y in some)
        means.append((x, y))
    return means


def smoothed(points: Points) -> Points:
    """Return the mean of each point and those before it, over a part of all (WINDOWS)."""
    window = max(1, len(points) // WINDOWS)
    means = []
    for index, (x, _) in enumerate(points):
        some = points[max(0, index + 1 - window) : index + 1]
        means.append((x, statistics.fmean(y for _, y in some)))
    return means


class _Drawn:
    """A curve with the points that are drawn of it."""

    def __init__(self, curve: Curve):
        self.curve = curve
        self.line = curve.line
        has_noise = curve.has_single_steps and not curve.is_exact
        self.single = thinned(curve.points) if has_noise else []

    def shown_values(self) -> list[float]:
        """Return the values that the axis is to show: the line's, and most single steps'."""
        single = sorted(y for _, y in self.single)
        cut = math.ceil(len(single) * OUTLIERS / 2)
        within = single[cut : len(single) - cut]
        return [y for _, y in self.line] + within

    def lines(self, x_axis: Axis, y_axis: Axis) -> str:
        colour = f"c{self.curve.colour % COLOURS}"
        parts = []
        if self.single:
            points = _polyline(self.single, x_axis, y_axis)
            parts.append(f'<polyline class="single {colour}" points="{points}"/>')
        points = _polyline(self.line, x_axis, y_axis)
        kind = "held" if self.curve.is_dotted else "mean"
        parts.append(f'<polyline class="{kind} {colour}" points="{points}"/>')
        return "".join(parts)

    def dots(self, x_axis: Axis, y_axis: Axis) -> str:
        # A single point makes no line.
        if not self.curve.is_dotted and len(self.line) > 1:
            return ""
        colour = f"c{self.curve.colour % COLOURS}"
        label = html.escape(self.curve.label)
        parts = []
        for x, y in self.line:
            left, down = _at(x, y, x_axis, y_axis)
            parts.append(
                f'<circle class="{colour}" cx="{left:.1f}" cy="{down:.1f}" r="2.6">'
                f"<title>{label}, {number(x)}: {number(y)}</title></circle>"
            )
        return "".join(parts)


def _at(x: float, y: float, x_axis: Axis, y_axis: Axis) -> tuple[float, float]:
    left = LEFT + x_axis.place(x) * (RIGHT - LEFT)
    down = BOTTOM - y_axis.place(y) * (BOTTOM - TOP)
    return left, down


def _polyline(points: Points, x_axis: Axis, y_axis: Axis) -> str:
    places = [_at(x, y, x_axis, y_axis) for x, y in points]
    return " ".join(f"{left:.1f},{down:.1f}" for left, down in places)


def _frame(x_axis: Axis, y_axis: Axis, x_label: str) -> str:
    """Return the grid, the ticks and their labels."""
    parts = []
    for tick in y_axis.ticks:
        down = BOTTOM - y_axis.place(tick) * (BOTTOM - TOP)
        parts.append(f'<path class="grid" d="M{LEFT} {down:.1f}H{RIGHT}"/>')
        label = _tick_label(tick)
        parts.append(f'<text x="{LEFT - 5}" y="{down + 3.5:.1f}" class="end">{label}</text>')
    # A label at the right edge would be cut, and one beside the axis' name would touch it.
    for tick in x_axis.ticks:
        left = LEFT + x_axis.place(tick) * (RIGHT - LEFT)
        parts.append(f'<path class="tick" d="M{left:.1f} {BOTTOM}v4"/>')
        anchor = "end" if left > RIGHT - 12 else "mid"
        label = _tick_label(tick)
        parts.append(f'<text x="{left:.1f}" y="{BOTTOM + 14}" class="{anchor}">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>')
    middle = (LEFT + RIGHT) / 2
    label = html.escape(x_label)
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" class="mid">{label}</text>')
    return "".join(parts)


def _legend(curves: list[Curve]) -> str:
    """Return a line for each curve: its mark, its label, and its last value."""
    parts = []
    for curve in curves:
        _, last = curve.line[-1]
        mark = "dot" if curve.is_dotted else "bar"
        parts.append(
            f'<span class="key"><i class="{mark} b{curve.colour % COLOURS}"></i>'
            f"{html.escape(curve.label)} <b>{number(last)}</b></span>"
        )
    return f'<div class="legend">{"".join(parts)}</div>'
