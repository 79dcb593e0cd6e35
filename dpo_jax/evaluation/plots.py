"""Figures, drawn without a display. matplotlib is imported only when a figure is drawn."""

import pathlib

import jax
import numpy as np

from dpo_jax.evaluation import statistics
from dpo_jax.evaluation.frontier import Curve
from dpo_jax.training.metric_names import is_share


def frontier(
    path, *, curve, reference: float, trajectories, optimum: tuple[float, float] | None, title: str
) -> None:
    """Draw expected reward against KL to the reference (the paper's figure 2, left).

    curve: (kls, rewards) of the exact bound, from KL 0 on.
    reference: its reward, drawn at KL 0.
    trajectories: of each round, (step, reward, kl) of the policy at each evaluation. Several are
    drawn as one walk, each with its number at its end.
    optimum: (reward, kl) that DPO aims at, or None.
    """
    from matplotlib.figure import Figure

    walk = list(trajectories[0])
    for trajectory in trajectories[1:]:
        done = walk[-1][0]
        # A round starts at the end of the one before.
        walk += [(done + step, reward, kl) for step, reward, kl in trajectory if step]
    steps, rewards, kls = zip(*walk, strict=True)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot(
        title=title, xlabel="KL(policy || reference), nats", ylabel="expected reward"
    )
    axes.grid(alpha=0.3)
    axes.plot(*curve, color="black", linewidth=1.2, label="highest reward at this KL (exact)")
    axes.plot(kls, rewards, color="0.75", linewidth=1)
    points = axes.scatter(kls, rewards, c=steps, cmap="viridis", s=28, zorder=4, label="policy")
    if len(trajectories) > 1:
        for number, trajectory in enumerate(trajectories, 1):
            _, reward, kl = trajectory[-1]
            # Above the curve, where no policy can be.
            axes.annotate(
                f"round {number}",
                (kl, reward),
                xytext=(-8, 4),
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
    axes.plot(
        kls[-1],
        rewards[-1],
        "o",
        color="black",
        markersize=8,
        fillstyle="none",
        zorder=5,
        label="policy at the end",
    )
    axes.plot(0, reference, "s", color="black", markersize=7, zorder=5, label="reference")
    if optimum:
        axes.plot(
            optimum[1],
            optimum[0],
            "*",
            color="crimson",
            markersize=17,
            zorder=3,
            label="optimum for this β (exact)",
        )
        kls, rewards = [*kls, optimum[1]], [*rewards, optimum[0]]
    axes.set(xlim=_limits([0, *kls]), ylim=_limits([reference, *rewards]))
    axes.legend(loc="lower right", frameon=False)  # below the curve, where a policy seldom is
    figure.colorbar(points, label="step")
    save(figure, path, dpi=150)


# Metric -> title of its panel in `curves`.
CURVES = {
    "loss/eval": "held-out loss",
    "rewards_eval/accuracies": "held-out accuracy",
    "rewards_eval/margins": "held-out margin",
    "ppo_train/reward": "reward",
    "ppo_train/kl": "KL, nats",
    "frontier/reward": "expected true reward",
    "frontier/kl": "KL(policy || reference), nats",
}


def curves(path, runs: dict[str, list[list[dict]]], field: str) -> None:
    """Draw the evaluations of several runs against the step, one panel per metric.

    runs: value of `field` -> the rows of metrics.jsonl of each seed. Seeds are drawn as their mean,
    with bars of its 95 % interval, at the steps that all of them have: where one stops earlier
    than others, a mean of the rest would be of other seeds. One of CURVES must be in the rows.
    """
    from matplotlib.figure import Figure

    in_rows = set()
    for seeds in runs.values():
        for rows in seeds:
            in_rows.update(*rows)
    found = [name for name in CURVES if name in in_rows]
    figure = Figure(figsize=(4.2 * len(found), 3.8), dpi=150, layout="constrained")
    for number, name in enumerate(found, 1):
        axes = figure.add_subplot(1, len(found), number, title=CURVES[name], xlabel="step")
        axes.grid(alpha=0.3)
        for label, seeds in runs.items():
            values = {}
            for rows in seeds:
                for row in rows:
                    if name in row:
                        values.setdefault(row["step"], []).append(row[name])
            means, below, above = [], [], []
            steps = [step for step in sorted(values) if len(values[step]) == len(seeds)]
            for step in steps:
                of_step = values[step]
                measured = statistics.mean_interval(of_step, is_share=is_share(name))
                mean = measured["mean"]
                is_alone = measured["se"] is None
                means.append(mean)
                below.append(0 if is_alone else mean - measured["low"])
                above.append(0 if is_alone else measured["high"] - mean)
            axes.errorbar(
                steps,
                means,
                [below, above] if any(above) or any(below) else None,
                marker="o",
                markersize=3,
                capsize=2,
                label=label,
            )
    figure.legend(
        *axes.get_legend_handles_labels(), title=field, loc="outside right upper", frameon=False
    )
    save(figure, path)


# Method -> colour, marker and name of its points.
STYLES = {
    "dpo": ("tab:blue", "o", "DPO"),
    "kto": ("tab:pink", "*", "KTO"),
    "ppo": ("tab:orange", "s", "PPO, reward model"),
    "ppo_gt": ("tab:green", "D", "PPO, true reward"),
    "ppo_gt_trl": ("tab:cyan", "h", "PPO, true reward, TRL's settings"),
    "unlikelihood": ("tab:red", "v", "unlikelihood"),
    "preferred_ft": ("tab:purple", "P", "Preferred-FT"),
    "best_of_n": ("tab:brown", "x", "best of N"),
    "sft": ("tab:gray", "^", "SFT"),
    "base": ("black", "*", "base model"),
    "rm_optimum": ("tab:olive", "+", "optimum for the reward model"),
    "label_optimum": ("tab:cyan", "1", "optimum for the labels"),
    "preferred_ft_closed_form": ("tab:purple", "X", "Preferred-FT, closed form"),
}
# Methods without steps: a dashed line joins their parameters.
UNTRAINED = ("best_of_n", "rm_optimum", "label_optimum", "preferred_ft_closed_form")
TICKS = (0, 0.1, 0.5, 1, 2, 4, 6, 8, 10, 15, 20, 30, 40, 60)  # nats
MARK = 5  # typographic points around a point that labels keep clear of
# Where a label may stand beside its point: direction (right, up) and gap, nearest first.
DIRECTIONS = ((1, -1), (-1, 1), (1, 0), (1, 1), (-1, -1), (-1, 0), (0, -1), (0, 1))
PLACES = [(right, up, gap) for gap in (5, 11, 18, 26) for right, up in DIRECTIONS]


def panels(
    path, rows: list[dict], curves: dict[str, Curve], titles: dict[str, str], *, curve_name: str
) -> None:
    """Draw reward against KL for all methods, one panel for each value of the rows' `panel`.

    rows: as in frontier.json: panel, method, parameter, seed, step, reward, kl, and, where known,
    reward_se and kl_se, and the optimum that a run aims at (analytic_reward, analytic_kl). The
    reference is a row of its own. curves: panel -> the highest reward, from KL 0 on.

    A thin line joins a run's checkpoints; its last one is the large point, hollow where it was
    measured on validation prompts ("prompts" of the row), as the run has not finished. Seeds are
    drawn as their mean, with dots where each of them ends. Bars are 95 % intervals, those of
    `statistics.over_seeds`: the legend says whether over prompts or over seeds. Two seeds are dots
    alone: an interval over them reaches 12.7 errors on either side. The band is the interval of an
    estimated curve. The KL axis is scaled by the square root, because many points lie near 0.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * len(titles), 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    legend = {}
    large_points = {}
    bars = {}
    for number, (panel, title) in enumerate(titles.items(), 1):
        axes = figure.add_subplot(1, len(titles), number, title=title)
        _draw_curve(axes, curves[panel], curve_name)
        of_panel = [row for row in rows if row["panel"] == panel]
        large_points[axes], bars[axes] = _draw_methods(axes, of_panel)
        _scale(axes, large_points[axes], curves[panel][:2], bars[axes])
        legend |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower center",
        ncols=3 * len(titles) if len(titles) > 1 else 2,
        frameon=False,
        fontsize=8,
    )
    # Labels can be placed only when everything else is.
    figure.canvas.draw()
    figure.set_layout_engine("none")
    for panel, axes in zip(titles, large_points, strict=True):
        _label(axes, large_points[axes], curves[panel][:2], bars[axes])
    save(figure, path)


def win_rates(path, panels: dict[str, tuple[str, list[dict]]]) -> None:
    """Draw win rates with their intervals, one panel per title.

    panels: title -> (name of the x axis, rows of x, label, method, rate, low and high). A line
    joins the rows of a label. If a method has several lines, only their colours differ.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(panels), 4.4), dpi=150, layout="constrained")
    for number, (title, (varies, rows)) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(
            1, len(panels), number, title=title, xlabel=varies, ylabel="win rate", ylim=(0, 1)
        )
        axes.grid(alpha=0.3)
        axes.axhline(0.5, color="0.5", linewidth=1, linestyle="--")
        lines = {}
        for row in rows:
            if row["rate"] is not None:
                lines.setdefault((row["method"], row["label"]), []).append(row)
        shared = len({method for method, _ in lines}) < len(lines)
        # Lines are shifted sideways so that no interval hides another.
        shift = 0.006 * max(np.ptp([row["x"] for row in rows]), 0.1)
        middle = (len(lines) - 1) / 2
        for place, ((method, label), line) in enumerate(lines.items()):
            color, marker, name = (None, "o", label) if shared else STYLES[method]
            points = sorted((row["x"], row["rate"], row["low"], row["high"]) for row in line)
            x, rate, low, high = np.transpose(points)
            axes.errorbar(
                x + shift * (place - middle),
                rate,
                np.abs([rate - low, high - rate]),
                color=color,
                marker=marker,
                capsize=2,
                linewidth=1.2,
                label=label if method == "best_of_n" else name,
            )
        axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def _draw_curve(axes, curve: Curve, name: str) -> None:
    kls, rewards, low, high = curve
    axes.plot(kls, rewards, color="black", linewidth=1.2, label=name)
    if low is not None:
        axes.fill_between(kls, low, high, color="black", alpha=0.12, linewidth=0)


def _draw_methods(axes, rows: list[dict]) -> tuple[list[tuple], list[tuple]]:
    """Draw each method's runs; return (kl, reward, parameter or "", colour) of large points.

    Beside them, (kl, reward) of the ends of their bars.
    """
    large_points = []
    bar_ends = []
    for row in rows:
        if row["method"] == "reference":
            start = _point([row])
            mark = dict(color="black", markersize=7, zorder=5, label="reference")
            axes.plot(start["kl"], start["reward"], "s", **mark)
            large_points.append((start["kl"], start["reward"], "", "black"))
            bar_ends += _draw_bars(axes, start, "black")
    for method, (color, marker, name) in STYLES.items():
        # parameter -> seed -> the rows of a run.
        runs = {}
        for row in rows:
            if row["method"] == method:
                of_parameter = runs.setdefault(row["parameter"], {})
                of_parameter.setdefault(row["seed"], []).append(row)
        last = []
        for parameter, seeds in runs.items():
            if method not in UNTRAINED:
                walk = [_point(same_step) for same_step in zip(*seeds.values(), strict=False)]
                kls, rewards = zip(*[(point["kl"], point["reward"]) for point in walk], strict=True)
                _line(axes, kls, rewards, color, linewidth=0.6, marker=marker, markersize=2.5)
            ends = [run[-1] for run in seeds.values()]
            last.append(_point(ends))
            large_points.append((last[-1]["kl"], last[-1]["reward"], parameter, color))
            if len(ends) > 1:
                dots = [row["kl"] for row in ends], [row["reward"] for row in ends]
                axes.plot(*dots, ".", color=color, markersize=2.5, alpha=0.4)
        kls, rewards = [point["kl"] for point in last], [point["reward"] for point in last]
        if method in UNTRAINED:
            _line(axes, kls, rewards, color, linewidth=1, linestyle="--")
        for point in last:
            bar_ends += _draw_bars(axes, point, color)
            if "analytic_kl" in point and method not in UNTRAINED:
                axes.plot(
                    point["analytic_kl"],
                    point["analytic_reward"],
                    "*",
                    color="crimson",
                    markersize=9,
                    fillstyle="none",
                    zorder=6,
                    label=f"{name}: optimum for its β",
                )
        large = dict(linestyle="", color=color, marker=marker, markersize=7, alpha=0.85)
        for point in last:
            at = point["kl"], point["reward"]
            if point["is_finished"]:
                axes.plot(*at, label=name, **large)
            else:
                axes.plot(*at, label=f"{name}, not finished", fillstyle="none", **large)
    return large_points, bar_ends


def _line(axes, kls, rewards, color: str, **options) -> None:
    axes.plot(kls, rewards, color=color, alpha=0.5, **options)


def _point(seeds: list[dict]) -> dict:
    """Return the means of rows that differ in their seed, with the ends of their intervals.

    A row that was measured on validation prompts is of a run that has not finished.
    """
    is_finished = all(row.get("prompts") != "validation" for row in seeds)
    point = dict(seeds=len(seeds), is_finished=is_finished)
    for name in ("kl", "reward"):
        interval = statistics.over_seeds(seeds, name)
        point |= interval | {f"{name}_unit": interval["interval_unit"]}
    for name in ("analytic_kl", "analytic_reward"):
        if name in seeds[0]:
            point[name] = float(np.mean([row[name] for row in seeds]))
    return point


def _draw_bars(axes, point: dict, color: str) -> list[tuple]:
    """Draw the intervals of a point along both axes, as far as they are known; return their ends.

    Ends are (kl, reward), low and high of each bar in turn. Intervals over two seeds are left out.
    """
    ends = []
    for side, name in (("xerr", "kl"), ("yerr", "reward")):
        low, high, unit = point[f"{name}_low"], point[f"{name}_high"], point[f"{name}_unit"]
        if unit is None or (unit == "seeds" and point["seeds"] == 2):
            continue
        if name == "kl":
            low = max(low, 0.0)  # no KL is less
        axes.errorbar(
            point["kl"],
            point["reward"],
            **{side: [[point[name] - low], [high - point[name]]]},
            label=f"95 % interval over {unit}",
            fmt="none",
            ecolor=color,
            elinewidth=1,
            capsize=2,
            zorder=4,
        )
        for end in (low, high):
            at = dict(kl=point["kl"], reward=point["reward"]) | {name: end}
            ends.append((at["kl"], at["reward"]))
    return ends


def _scale(axes, points: list[tuple], curve: tuple, bar_ends: list[tuple]) -> None:
    """Give the axes room for points, bars and the curve above them, names, and a grid."""
    marked = [point[:2] for point in points] + bar_ends
    highest = 1.1 * max(kl for kl, _ in marked)
    rewards = [reward for kl, reward in zip(*curve, strict=True) if kl < highest]
    rewards += [reward for _, reward in marked]

    def signed_root(x):
        return np.sign(x) * np.sqrt(np.abs(x))

    def signed_square(x):
        return np.sign(x) * x**2

    axes.set_xscale("function", functions=(signed_root, signed_square))
    axes.set(
        xlim=(-0.001 * highest, highest),
        xticks=[tick for tick in TICKS if tick < highest],
        ylim=_limits(rewards),
        ylabel="expected true reward",
        xlabel="KL(policy || reference), nats, square-root scale",
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)


def _label(axes, points: list[tuple], curve: tuple, bar_ends: list[tuple]) -> None:
    """Write each parameter beside its point, once for all seeds, where it hides the least.

    Tried are all of PLACES. Hidden are other points, bars, the curve and the labels placed before.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

    # Everything is compared on the screen: a label's size is in points, whatever the axes' scales.
    pixels = axes.figure.dpi / 72  # per typographic point
    # This is why the figure must be drawn first: before, the scales are not settled.
    marks = axes.transData.transform([point[:2] for point in points])
    line = axes.transData.transform(np.transpose(curve))
    taken = np.concatenate([_boxes(marks, MARK * pixels), _boxes(line, pixels)])
    if bar_ends:
        ends = axes.transData.transform(bar_ends).reshape(-1, 4)  # from low to high
        taken = np.concatenate([taken, ends + pixels * np.array([-1, -1, 1, 1])])
    labelled = {point[2:]: point for point in points if point[2]}  # the last seed's point
    for kl, reward, text, color in labelled.values():
        # First at its point, to learn its size, then moved to the best place.
        label = axes.annotate(
            text,
            (kl, reward),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=7,
            color=color,
            ha="center",
            va="center",
            path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops=dict(arrowstyle="-", color=color, linewidth=0.4, shrinkA=0, shrinkB=MARK),
        )
        half = Text.get_window_extent(label).size / 2
        # By half the label's size, so that it touches its point's surroundings with an edge or a
        # corner.
        shifts = np.array([(right, up) * (half + gap * pixels) for right, up, gap in PLACES])
        boxes = _boxes(axes.transData.transform((kl, reward)) + shifts, half)
        # The first of equals, which is the nearest.
        best = np.argmin([_hidden(box, taken, axes.bbox.extents) for box in boxes])
        label.set_position(shifts[best] / pixels)
        # Later labels keep clear of this one.
        taken = np.concatenate([taken, boxes[best : best + 1]])


def _boxes(centers, half) -> np.ndarray:
    """[left, bottom, right, top] of boxes around points."""
    return np.hstack([centers - half, centers + half])


def _hidden(box, taken, frame) -> float:
    """Square pixels of the boxes `taken` that a label hides; infinite if it leaves the frame."""
    # A label across the frame would lie over the ticks, or be cut off.
    if (box[:2] < frame[:2]).any() or (box[2:] > frame[2:]).any():
        return np.inf
    sides = np.minimum(box[2:], taken[:, 2:]) - np.maximum(box[:2], taken[:, :2])
    return sides.clip(0).prod(axis=-1).sum()


def _limits(values) -> tuple[float, float]:
    """A range that holds the values, with some room around them."""
    room = 0.08 * (max(values) - min(values)) or 1.0
    return min(values) - room, max(values) + room


def save(figure, path, **options) -> None:
    """Write the picture as PNG, and beside it as PDF, on process 0 only."""
    import matplotlib

    if jax.process_index() != 0:
        return
    path = pathlib.Path(path)
    # Publishers take no Type 3 fonts; without a date, equal figures are equal files.
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None}, **options)
    figure.savefig(path, **options)
