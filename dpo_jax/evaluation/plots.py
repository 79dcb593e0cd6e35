"""Figures, drawn without a display; matplotlib is imported only when one is drawn."""


def frontier(path, *, curve, reference: float, trajectory, optimum: tuple[float, float] | None, title: str) -> None:
    """Expected reward against KL to the reference (the paper's figure 2, left), written to `path`.

    curve: (kls, rewards) of the exact bound, from KL 0 on.   reference: its reward, which is at KL 0.
    trajectory: (step, reward, kl) of the policy at each evaluation.   optimum: (reward, kl) that DPO aims at, or None.
    """
    from matplotlib.figure import Figure
    steps, rewards, kls = zip(*trajectory, strict=True)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="KL(policy || reference), nats", ylabel="expected reward")
    axes.grid(alpha=0.3)
    axes.plot(*curve, color="black", linewidth=1.2, label="highest reward at this KL (exact)")
    axes.plot(kls, rewards, color="0.75", linewidth=1)
    points = axes.scatter(kls, rewards, c=steps, cmap="viridis", s=28, zorder=4, label="policy")
    axes.plot(kls[-1], rewards[-1], "o", color="black", markersize=8, fillstyle="none", zorder=5,
              label="policy at the end")
    axes.plot(0, reference, "s", color="black", markersize=7, zorder=5, label="reference")
    if optimum:
        axes.plot(optimum[1], optimum[0], "*", color="crimson", markersize=17, zorder=3,
                  label="optimum for this β (exact)")
        kls, rewards = [*kls, optimum[1]], [*rewards, optimum[0]]
    axes.set(xlim=_limits([0, *kls]), ylim=_limits([reference, *rewards]))
    axes.legend(loc="lower right", frameon=False)  # below the curve, where a policy seldom is
    figure.colorbar(points, label="step")
    figure.savefig(path, dpi=150)


STYLES = {  # method -> colour, marker and name of its points
    "dpo": ("tab:blue", "o", "DPO"),
    "ppo": ("tab:orange", "s", "PPO, reward model"),
    "ppo_gt": ("tab:green", "D", "PPO, true reward"),
    "unlikelihood": ("tab:red", "v", "unlikelihood"),
    "preferred_ft": ("tab:purple", "P", "Preferred-FT"),
    "best_of_n": ("tab:brown", "x", "best of N"),
    "rm_optimum": ("tab:olive", "+", "optimum for the reward model"),
}


def panels(path, rows: list[dict], curves: dict[str, tuple], titles: dict[str, str], *, curve_name: str) -> None:
    """Reward against KL for all methods, a panel for each value of the rows' `panel`, written to `path`.

    rows: as in frontier.json: panel, method, parameter, seed, step, reward, kl. A run's checkpoints are joined by a
    thin line, its last one is the large point. curves: panel -> (kls, rewards) of the best that can be.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.2 * len(titles), 5.6), layout="constrained")
    for number, (panel, title) in enumerate(titles.items()):
        axes = figure.add_subplot(1, len(titles), number + 1, title=title, xlabel="KL(policy || reference), nats")
        axes.grid(alpha=0.3)
        of_panel = [row for row in rows if row["panel"] == panel]
        axes.plot(*curves[panel], color="black", linewidth=1.2, label=curve_name)
        for method, (color, marker, name) in STYLES.items():
            runs = {}
            for row in of_panel:
                if row["method"] == method:
                    runs.setdefault((row["parameter"], row["seed"]), []).append(row)
            for run, points in enumerate(runs.values()):
                kls, rewards = [point["kl"] for point in points], [point["reward"] for point in points]
                axes.plot(kls, rewards, color=color, linewidth=0.6, alpha=0.5, marker=marker, markersize=2.5)
                axes.plot(kls[-1:], rewards[-1:], linestyle="", color=color, marker=marker, markersize=7, alpha=0.85,
                          label="" if run else name)
            labelled = {parameter: points[-1] for (parameter, _), points in runs.items() if parameter}
            for parameter, point in labelled.items():
                axes.annotate(parameter, (point["kl"], point["reward"]), xytext=(6, -9), textcoords="offset points",
                              fontsize=7, color=color)
        highest = max(row["kl"] for row in of_panel)
        axes.set(xlim=_limits([0, highest]), ylim=_limits([row["reward"] for row in of_panel]))
        if number == 0:
            axes.set_ylabel("expected true reward")
            axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)


def _limits(values) -> tuple[float, float]:
    """A range that holds the values, with some room around them."""
    room = 0.08 * (max(values) - min(values)) or 1.0
    return min(values) - room, max(values) + room
