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


def _limits(values) -> tuple[float, float]:
    """A range that holds the values, with some room around them."""
    room = 0.08 * (max(values) - min(values)) or 1.0
    return min(values) - room, max(values) + room
