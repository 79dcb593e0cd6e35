"""Compare three rounds of sampling, labelling and training with one, at equal numbers of labels.

    python -m experiments.rounds --workdir=DIR

On the exact toy, with five seeds and four targets. A target is the policy that DPO aims at with a
beta of that value from the first policy on. Arms, each with the same labels and steps in all:

    moved    three rounds; each round's reference is the policy of the round before, so beta is
             three times the target's
    first    three rounds; the reference is always the first policy (config.dpo.reference=first)
    offline  one round: all pairs are sampled from the first policy

Within a seed, all arms start from one policy. Every run is an ordinary run of dpo_jax.train in
DIR/SEED-ROUNDS, so finished runs are reused. Writes DIR/rounds.json, with a row per run and round,
the gaps to the highest reward at equal KL and their differences, and DIR/rounds.png. On one CPU
core it takes about 12 minutes.
"""

import contextlib
import io
import json
import pathlib
import time

import numpy as np

from dpo_jax.evaluation import statistics
from experiments import toy_runs
from experiments.commands import in_workdir

ROUNDS = 3
# Arm -> (rounds, config.dpo.reference, colour, marker, name).
ARMS = {
    "moved": (ROUNDS, "init", "tab:blue", "o", "3 rounds, reference moved"),
    "first": (ROUNDS, "first", "tab:green", "s", "3 rounds, reference fixed"),
    "offline": (1, "init", "tab:orange", "D", "offline, 1 round"),
}
BASE = "offline"  # the arm that the others are compared with
TARGETS = (2.0, 1.0, 0.5, 0.25)
KLS = (0.25, 1.0, 2.5, 5.0)  # nats, at which the arms are compared
SEEDS = 5
PROMPTS = 1000  # of a round; each gives six pairs
STEPS = 120  # of a round


def config_of(arm: str, target: float, seed: int):
    """Return the config of one run."""
    from configs import toy

    rounds, reference, *_ = ARMS[arm]
    share = ROUNDS // rounds  # of labels and steps, so that they are equal in all
    config = toy.get_config()
    config.seed = seed
    config.rounds = rounds
    config.pairs.prompts = PROMPTS * share
    steps = STEPS * share
    # k rounds with a moved reference end at the optimum of beta / k.
    beta = target * rounds if reference == "init" else target
    config.dpo.update(
        beta=beta,
        reference=reference,
        steps=steps,
        eval_every=steps,
        save_every=steps,
        log_every=10,
    )
    config.run = f"{arm}_{target:g}"
    return config


def run_seed(workdir: str, seed: int) -> list[dict]:
    """Make all runs of a seed; return a row for each run and round."""
    from dpo_jax import config as configs
    from dpo_jax.evaluation import exact
    from dpo_jax.pipeline.stages import run_stages
    from dpo_jax.training.metrics import read_rows

    rows = []
    for arm, (rounds, *_) in ARMS.items():
        # Runs of one WORKDIR share the pairs of round 1, whose number differs.
        folder = pathlib.Path(workdir) / f"{seed}-{rounds}"
        for target in TARGETS:
            began = time.monotonic()
            config = config_of(arm, target, seed)
            with contextlib.redirect_stdout(io.StringIO()):
                run_stages(config, str(folder))
            for number in range(1, rounds + 1):
                names = configs.folder_names(configs.of_round(config, number))
                last = read_rows(folder / names["dpo"] / "metrics.jsonl")[-1]
                rows.append(
                    dict(
                        seed=seed,
                        arm=arm,
                        target=target,
                        beta=config.dpo.beta,
                        round=number,
                        reward=last["frontier/reward"],
                        kl=last["frontier/kl"],
                    )
                )
            print(
                f"seed {seed}: {arm} {target:g}  reward {rows[-1]['reward']:.3f}  "
                f"KL {rows[-1]['kl']:.3f}  ({time.monotonic() - began:.0f} s)",
                flush=True,
            )

    reference_PC, rewards_PC = toy_runs.first_policy(folder)
    for row in rows:
        bound = float(exact.bound(reference_PC, rewards_PC, [row["kl"]])[0])
        row["gap"] = bound - row["reward"]
        reward, kl = exact.optimum(reference_PC, rewards_PC, row["target"])
        row["target_reward"], row["target_kl"] = float(reward), float(kl)
    return rows


def ends(rows: list[dict], arm: str) -> list[dict]:
    """Return the rows at the end of an arm's runs."""
    rounds, *_ = ARMS[arm]
    return [row for row in rows if row["arm"] == arm and row["round"] == rounds]


def gap_at(rows: list[dict], kl: float) -> float:
    """Return the gap to the bound at a KL, interpolated between the ends of one seed's runs.

    nan where no run went that far. The first policy has KL 0 and no gap.
    """
    ordered = sorted(rows, key=_kl)
    if kl > ordered[-1]["kl"]:
        return float("nan")
    kls = [0.0, *(row["kl"] for row in ordered)]
    return float(np.interp(kl, kls, [0.0, *(row["gap"] for row in ordered)]))


def _kl(row: dict) -> float:
    return row["kl"]


def interval(values) -> dict[str, float]:
    """Return the mean of values over seeds, with its 95% interval by Student's t; nan of one."""
    found = statistics.mean_interval(values)
    low, high = (float("nan") if found[end] is None else found[end] for end in ("low", "high"))
    return dict(seeds=found["n"], mean=found["mean"], low=low, high=high)


def matched(rows: list[dict]) -> list[dict]:
    """Return the gap of each arm at each of KLS, and how much smaller it is than BASE's.

    A difference is taken within a seed, before the mean: it is reward won at equal KL.
    """
    seeds = sorted({row["seed"] for row in rows})
    found = []
    for kl in KLS:
        gaps = {}
        for arm in ARMS:
            of_arm = ends(rows, arm)
            gaps[arm] = [gap_at([row for row in of_arm if row["seed"] == s], kl) for s in seeds]
        for arm in ARMS:
            won = np.subtract(gaps[BASE], gaps[arm])
            found.append(dict(kl=kl, arm=arm, gap=interval(gaps[arm]), won=interval(won)))
    return found


def at_targets(rows: list[dict]) -> list[dict]:
    """Return the reward, KL and gap of each arm at the end, for each target."""
    found = []
    for target in TARGETS:
        for arm in ARMS:
            of_arm = [row for row in ends(rows, arm) if row["target"] == target]
            measured = {
                name: interval([row[name] for row in of_arm])
                for name in ("reward", "kl", "gap", "target_reward", "target_kl")
            }
            found.append(dict(target=target, arm=arm) | measured)
    return found


def table(targets: list[dict], equal: list[dict]) -> str:
    """Return both summaries as tables for a person."""
    lines = [f"{'target':<8}{'arm':<10}{'reward':>9}{'KL':>9}{'aimed at':>18}{'gap, 95%':>26}"]
    for row in targets:
        aimed = f"{row['target_reward']['mean']:.3f} / {row['target_kl']['mean']:.3f}"
        cells = f"{row['reward']['mean']:>9.3f}{row['kl']['mean']:>9.3f}{aimed:>18}"
        lines.append(f"{row['target']:<8g}{row['arm']:<10}{cells}{_shown(row['gap']):>26}")
    lines += ["", f"{'KL':<8}{'arm':<10}{'gap, 95%':>26}{'reward won, 95%':>28}"]
    for row in equal:
        won = "" if row["arm"] == BASE else _shown(row["won"])
        line = f"{row['kl']:<8g}{row['arm']:<10}{_shown(row['gap']):>26}{won:>28}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _shown(value: dict[str, float]) -> str:
    return f"{value['mean']:.4f} ({value['low']:.4f}, {value['high']:.4f})"


def curve(workdir: str, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Return KLs up to `largest` and the bound at them, for the first seed."""
    policy = toy_runs.first_policy(pathlib.Path(workdir) / f"0-{ROUNDS}")
    return toy_runs.bound_curve(*policy, largest)


def draw(path: pathlib.Path, rows: list[dict], bound: tuple, targets: list[dict]) -> None:
    """Draw the rounds of the first seed along the frontier, and the gaps of all seeds."""
    from matplotlib.figure import Figure

    from dpo_jax.evaluation import plots

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    walks, gaps = figure.subplots(1, 2)
    walks.plot(*bound, color="black", linewidth=1.2, label="highest reward at this KL (exact)")
    walks.plot(0, bound[1][0], "s", color="black", markersize=7, label="first policy")
    for arm, (_, _, color, marker, name) in ARMS.items():
        style = dict(color=color, marker=marker, markersize=5)
        for target in TARGETS:
            walk = [
                row for row in rows if (row["arm"], row["target"], row["seed"]) == (arm, target, 0)
            ]
            kls = [row["kl"] for row in walk]
            rewards = [row["reward"] for row in walk]
            label = name if target == TARGETS[0] else None
            walks.plot(kls, rewards, label=label, linewidth=0.8, alpha=0.8, **style)
            if arm == "moved" and target == min(TARGETS):
                for row in walk:
                    walks.annotate(
                        f"round {row['round']}",
                        (row["kl"], row["reward"]),
                        xytext=(-8, 4),
                        textcoords="offset points",
                        ha="right",
                        fontsize=8,
                    )
        of_arm = [row for row in targets if row["arm"] == arm]
        mean = np.array([row["gap"]["mean"] for row in of_arm])
        high = np.array([row["gap"]["high"] for row in of_arm])
        kls = [row["kl"]["mean"] for row in of_arm]
        gaps.errorbar(kls, mean, high - mean, capsize=3, linewidth=1.2, label=name, **style)
    walks.set(
        title="the rounds of seed 0, one line a target",
        xlabel="KL(policy || first policy), nats",
        ylabel="expected reward",
    )
    gaps.set(
        title=f"gap at the end, mean of {SEEDS} seeds with 95% intervals",
        xlabel="KL(policy || first policy), nats",
        ylabel="highest reward at this KL minus reward",
        ylim=(0, None),
    )
    for axes in (walks, gaps):
        axes.grid(alpha=0.3)
    walks.legend(frameon=False, loc="lower right")
    gaps.legend(frameon=False)
    plots.save(figure, path, dpi=130)


def run(workdir: str, jobs: int) -> list[dict]:
    """Make the runs, one process per seed; write rounds.json and rounds.png."""
    from dpo_jax.console import say

    began = time.monotonic()
    tasks = [(workdir, seed) for seed in range(SEEDS)]
    rows = toy_runs.rows_of_tasks(run_seed, tasks, jobs)
    targets, equal = at_targets(rows), matched(rows)
    folder = pathlib.Path(workdir)
    result = dict(targets=targets, equal_kl=equal, rows=rows)
    (folder / "rounds.json").write_text(json.dumps(result, indent=1) + "\n")
    bound = curve(workdir, 1.05 * max(map(_kl, rows)))
    draw(folder / "rounds.png", rows, bound, targets)
    print(table(targets, equal))
    say(f"{workdir}/rounds.json, {workdir}/rounds.png: {time.monotonic() - began:.0f} s")
    return rows


def main():
    from absl import flags

    from dpo_jax import command_line

    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs and the results.")
    jobs = flags.DEFINE_integer("jobs", 1, "Number of processes.")
    flags.mark_flags_as_required(["workdir"])
    toy_runs.one_thread()

    def compare():
        with in_workdir(workdir.value) as folder:
            run(folder, jobs.value)

    command_line.run(compare, __doc__)


if __name__ == "__main__":
    main()
