"""Compare DPO's implicit reward with the true reward on the toy, over all completions.

    python -m experiments.implicit_reward --workdir=DIR

A policy that DPO has trained is a reward model too: beta * log(policy / reference) equals the
reward up to a term that depends on the prompt alone (the paper's section 5). The toy's reward is
known, labels follow it by Bradley-Terry, and all 4 * 32,768 pairs of prompt and completion can be
enumerated, so the two are compared without sampling. Both are centred on each prompt's mean.

Trains configs/toy.py in DIR/seed-N for each seed, and reuses the runs that are finished. Writes
DIR/implicit_reward.json, with a row per seed, and DIR/implicit_reward.png. It takes about a minute
per seed on 2 CPU cores.
"""

import dataclasses
import json
import pathlib

import numpy as np

from experiments.commands import in_workdir

# How completions count -> what the picture says of it.
WEIGHTS = {"uniform": "all count alike", "reference": "counted by the reference's probability"}
# Of the picture: cells along each axis, its ends and ticks, and the shares that colours show.
CELLS = 90
ENDS = np.array([-8.5, 8.5])
TICKS = range(-8, 9, 2)
SHARES = (1e-6, 3e-2)


@dataclasses.dataclass(frozen=True)
class Rewards:
    """Rewards of all completions, [P, C] each, and what the reference makes of them."""

    true_PC: np.ndarray
    implicit_PC: np.ndarray
    reference_PC: np.ndarray  # log-probs, nats

    def weights(self, name: str) -> np.ndarray:
        """Return how completions count, by a name in WEIGHTS; those of a prompt sum to 1."""
        if name == "reference":
            return np.exp(self.reference_PC)
        return np.full(self.true_PC.shape, 1 / self.true_PC.shape[-1])


def centred(values_PC: np.ndarray, weights_PC: np.ndarray) -> np.ndarray:
    """Return values less each prompt's weighted mean; the weights of a prompt sum to 1."""
    return values_PC - (weights_PC * values_PC).sum(axis=-1, keepdims=True)


def agreement(true_PC: np.ndarray, implicit_PC: np.ndarray, weights_PC: np.ndarray) -> dict:
    """Return slope, correlation and rms of the difference of two rewards.

    All are of values centred on each prompt's mean, as rewards that differ by a function of the
    prompt are the same (the paper's definition 1). slope: of the least-squares line of the implicit
    reward on the true one. weights_PC: of completions; those of a prompt sum to 1.
    """
    x_PC = centred(true_PC, weights_PC)
    y_PC = centred(implicit_PC, weights_PC)
    prompts = len(weights_PC)
    xx = (weights_PC * x_PC**2).sum() / prompts
    yy = (weights_PC * y_PC**2).sum() / prompts
    xy = (weights_PC * x_PC * y_PC).sum() / prompts
    rms = np.sqrt((weights_PC * (y_PC - x_PC) ** 2).sum() / prompts)
    return dict(slope=float(xy / xx), correlation=float(xy / np.sqrt(xx * yy)), rms=float(rms))


def run_seed(folder: pathlib.Path, seed: int) -> tuple[dict, Rewards]:
    """Train the toy with a seed, if it is not done; return its row and the rewards."""
    import dpo_jax
    from configs import toy as toy_config
    from dpo_jax.data import toy
    from dpo_jax.evaluation import exact
    from dpo_jax.evaluation.toy_report import exact_reference
    from dpo_jax.models import loading
    from dpo_jax.parallel import sharding

    config = toy_config.get_config()
    config.seed = seed
    folders = dpo_jax.run(config, folder / f"seed-{seed}")
    mesh = sharding.make_mesh()
    loaded = {}
    for stage in ("sft", "dpo"):
        checkpoint = loading.open_checkpoint(str(folders[stage] / "hf"))
        loaded[stage] = checkpoint.load(mesh, append_eos=False)
    reference_PC, true_PC = exact_reference(loaded["sft"], config.reward.kind)
    policy = loaded["dpo"]
    policy_PC = exact.enumerate_log_probs(policy.config, policy.params, toy.PROMPTS)
    implicit_PC = config.dpo.beta * (policy_PC - reference_PC)

    rewards = Rewards(true_PC, implicit_PC, reference_PC)
    row = dict(seed=seed, beta=config.dpo.beta, completions=true_PC.size)
    for name in WEIGHTS:
        found = agreement(true_PC, implicit_PC, rewards.weights(name))
        row |= {f"{measure}_{name}": value for measure, value in found.items()}
    return row, rewards


def draw(path: pathlib.Path, rows: list[dict], seeds: list[Rewards]) -> None:
    """Draw the implicit against the true reward: a column per seed, a row per way to count."""
    from matplotlib.figure import Figure

    from dpo_jax.evaluation import plots

    figure = Figure(figsize=(4.1 * len(seeds) + 0.8, 8.2), dpi=110, layout="constrained")
    all_axes = figure.subplots(len(WEIGHTS), len(seeds), squeeze=False, sharex=True, sharey=True)
    for name, of_row in zip(WEIGHTS, all_axes, strict=True):
        for row, rewards, axes in zip(rows, seeds, of_row, strict=True):
            cells = _draw_panel(axes, rewards, name)
            slope, correlation = row[f"slope_{name}"], row[f"correlation_{name}"]
            axes.plot(ENDS, ENDS, color="black", linewidth=0.9, label="equal")
            axes.plot(
                ENDS,
                slope * ENDS,
                color="crimson",
                linewidth=0.9,
                linestyle="--",
                label=f"fit, slope {slope:.3f}",
            )
            axes.set(
                title=f"seed {row['seed']}: correlation {correlation:.3f}",
                xlim=ENDS,
                ylim=ENDS,
                xticks=TICKS,
                yticks=TICKS,
                aspect="equal",
            )
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, loc="upper left")
        of_row[0].set_ylabel("β log(policy / reference)")
        figure.colorbar(
            cells, ax=of_row, label=f"share of a prompt's completions,\n{WEIGHTS[name]}"
        )
    for axes in all_axes[-1]:
        axes.set_xlabel("true reward, less the prompt's mean")
    plots.save(figure, path)


def _draw_panel(axes, rewards: Rewards, name: str):
    """Draw the completions; a cell's colour says how many there are, counted by a name's weights.

    They are too many for a point each.
    """
    from matplotlib.colors import LogNorm

    weights_PC = rewards.weights(name)
    return axes.hexbin(
        centred(rewards.true_PC, weights_PC).ravel(),
        centred(rewards.implicit_PC, weights_PC).ravel(),
        weights_PC.ravel() / len(weights_PC),
        reduce_C_function=np.sum,
        gridsize=CELLS,
        extent=(*ENDS, *ENDS),
        norm=LogNorm(*SHARES, clip=True),
        cmap="viridis_r",
        linewidths=0.1,
    )


def table(rows: list[dict]) -> str:
    """Return the rows as a table."""
    lines = []
    for name in WEIGHTS:
        lines.append(f"{name + ' weights':<20}{'slope':>8}{'correlation':>13}{'rms':>8}")
        for row in rows:
            lines.append(
                f"{'seed ' + str(row['seed']):<20}{row[f'slope_{name}']:>8.4f}"
                f"{row[f'correlation_{name}']:>13.4f}{row[f'rms_{name}']:>8.4f}"
            )
    return "\n".join(lines)


def run(folder: pathlib.Path, seeds: int) -> list[dict]:
    """Make the runs that are not done; write implicit_reward.json and implicit_reward.png."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    rewards = []
    for seed in range(seeds):
        row, of_seed = run_seed(folder, seed)
        rows.append(row)
        rewards.append(of_seed)
    (folder / "implicit_reward.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(folder / "implicit_reward.png", rows, rewards)
    print(table(rows))
    return rows


def main():
    from absl import flags

    from dpo_jax import command_line
    from dpo_jax.parallel import processes

    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs and the results.")
    seeds = flags.DEFINE_integer(
        "seeds", 3, "How many seeds: 0, 1, ...", lower_bound=1, upper_bound=20
    )
    flags.mark_flags_as_required(["workdir"])
    processes.start()

    def compare():
        with in_workdir(workdir.value) as folder:
            run(pathlib.Path(folder), seeds.value)

    command_line.run(compare, __doc__)


if __name__ == "__main__":
    main()
