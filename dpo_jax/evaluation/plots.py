"""Figures, drawn without a display; matplotlib is imported only when one is drawn."""

MARGIN = 0.08  # empty share of an axis beyond the data


def frontier(path, *, curve, reference: float, trajectory, optimum: tuple[float, float], title: str) -> None:
    """Expected reward against KL to the reference (the paper's figure 2, left), written to `path`.

    curve: (kls, rewards) of the exact bound, from KL 0 on.   reference: its reward, at KL 0.
    trajectory: (step, reward, kl) of the policy at each evaluation.   optimum: (reward, kl) that DPO aims at.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, rewards, kls = zip(*trajectory, strict=True)
    axes.plot(*curve, color="black", linewidth=1.2, label="highest reward at this KL (exact)")
    axes.plot(kls, rewards, color="0.75", linewidth=1, zorder=2)
    points = axes.scatter(kls, rewards, c=steps, cmap="viridis", s=28, zorder=3, label="DPO policy")
    axes.plot(0, reference, "s", color="black", markersize=7, zorder=4, label="reference")
    best_reward, best_kl = optimum
    axes.plot(best_kl, best_reward, "*", color="crimson", markersize=15, zorder=4,
              label="optimum at this β (exact)")
    figure.colorbar(points, label="step")
    axes.set_xlim(_limits([0, *kls, best_kl]))
    axes.set_ylim(_limits([reference, *rewards, best_reward]))
    axes.set(xlabel="KL(policy || reference), nats", ylabel="expected reward", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)  # a concave curve leaves this corner free
    figure.savefig(path, dpi=150)


def _limits(values) -> tuple[float, float]:
    """A range that holds the values with some room around them."""
    room = MARGIN * (max(values) - min(values)) or MARGIN
    return min(values) - room, max(values) + room
