"""Draw the exact reward/KL frontier of every method on the toy.

    python -m experiments.toy_frontier --workdir=DIR --seeds=10

All completions are enumerated, so the rewards, the KLs and the highest reward at each KL are exact
(the paper's figure 2, left, relies on samples). Panels: (a) additive reward, Bradley-Terry labels;
(b) deterministic labels; (c) a reward that saturates. --seeds=N takes N seeds of each panel, and
--seeds=10,3,3 as many of each panel in turn.

All runs start from one SFT model, DIR/shared/sft. A seed then draws its own completions, labels and
order of the data. Every run is an ordinary run of dpo_jax.train in DIR/PANEL-SEED, so finished runs
are reused. Runs of one process share their compiled steps. Writes DIR/frontier.json, with a row per
run and checkpoint, DIR/frontier.png and .pdf, and as .csv, .md and .tex three tables: DIR/frontier,
the ends of all runs over seeds; DIR/matched_kl, all methods at equal KLs; and DIR/costs, what a run
of each method takes (on the first seed of the first panel), beside its reward at 2 nats there, the
mean over seeds.
"""

import contextlib
import io
import pathlib
import time

import numpy as np

from experiments import cost_table, frontier_file, toy_runs
from experiments.commands import in_workdir

# Panel -> (title, labels, reward).
PANELS = {
    "a": ("(a) additive reward, Bradley-Terry labels", "bradley_terry", "toy"),
    "b": ("(b) additive reward, deterministic labels", "deterministic", "toy"),
    "c": ("(c) saturating reward, Bradley-Terry labels", "bradley_terry", "toy_saturating"),
}
# Method -> (swept field, its values, how a value is written).
SWEEPS = {
    "dpo": ("dpo.beta", (5.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.05), "β={:g}"),
    "unlikelihood": ("unlikelihood.alpha", (0.05, 0.1, 0.5, 1.0), "α={:g}"),
    "preferred_ft": (None, (None,), ""),
    "ppo": ("ppo.target_kl", (0.5, 1.0, 3.0, 6.0), "target {:g}"),
    "ppo_gt": ("ppo.target_kl", (0.5, 1.0, 3.0, 6.0), "target {:g}"),
}
# Stage -> steps; each is evaluated after every third of them. 480 pass twice over the pairs: after
# 240, DPO at beta 2 was up to 0.043 from the reward it aims at, with seeds 100 to 104.
STEPS = {"dpo": 480, "unlikelihood": 480, "preferred_ft": 480, "rm": 480, "ppo": 27}
BEST_OF = (1, 4, 16, 64, 128)
# Of best of N between those, at which rewards at equal KL are read.
CLOSED_NS = np.geomspace(1, max(BEST_OF), 60)
RM_BETAS = (5.0, 2.0, 1.0, 0.5, 0.25)  # for the optimal policies of the learned reward
COSTS_KL = 2.0  # nats, at which the table of costs has the methods' rewards
# Panels whose labels have a likeliest reward, and one of the same form as the true one.
LIKELIEST = ("a",)
# Methods whose points are to lie at the optimum of the true reward.
AIMED = ("dpo", "label_optimum")


def shared_sft(workdir: str) -> str:
    """Train the SFT model that all runs start from, if it is not done; return its folder."""
    from configs import toy
    from dpo_jax.pipeline.stages import run_stages

    config = toy.get_config()
    config.stages = ("sft",)
    folder = pathlib.Path(workdir) / "shared"
    with contextlib.redirect_stdout(io.StringIO()):
        run_stages(config, str(folder))
    return str(folder / "sft" / "hf")


def config_of(panel: str, method: str, value: float | None, seed: int, sft: str):
    """Return the config of one run, and the stage that trains it. sft: where it starts."""
    from configs import toy

    _, labels, reward = PANELS[panel]
    config = toy.get_config(method)
    config.seed = seed
    config.stages = config.stages[1:]
    config.model.path = sft
    config.model.scratch = {}
    config.reward.kind = reward
    if "pairs" in config.stages:
        config.pairs.labels = labels
    for stage in set(config.stages) & STEPS.keys():
        config[stage].update(
            steps=STEPS[stage], eval_every=STEPS[stage] // 3, save_every=STEPS[stage], log_every=10
        )
    if method == "dpo":
        config.dpo.cache_reference = True  # the seven runs share the reference's log-probs
    field, _, _ = SWEEPS[method]
    stage = "ppo" if method == "ppo_gt" else method
    if field:
        config[stage][field.partition(".")[2]] = value
    config.run = method if value is None else f"{method}_{value:g}"
    if config.run in config:  # a stage's own name
        config.run += "_run"
    return config, stage


def run_seeds(
    workdir: str, panel: str, methods: list[str], seeds: list[int], sft: str
) -> list[dict]:
    """Make the runs of some methods on a panel with some seeds; return their rows."""
    rows = []
    folders = {seed: pathlib.Path(workdir) / f"{panel}-{seed}" for seed in seeds}
    # Method by method: where this is stopped early, --method draws what all seeds have.
    for method in methods:
        for seed, folder in folders.items():
            for value in SWEEPS[method][1]:
                rows += run_one(folder, panel, method, value, seed, sft)
    for seed, folder in folders.items():
        if "ppo" in methods:  # it has trained a reward model
            rows += optima(panel, "rm_optimum", seed, sft, toy_runs.learned_rewards(folder))
        if panel in LIKELIEST and (folder / "pairs").exists():
            rewards_PC = toy_runs.likeliest_reward(folder / "pairs" / "pairs.jsonl")
            rows += optima(panel, "label_optimum", seed, sft, rewards_PC)
    return rows


def run_one(
    folder: pathlib.Path, panel: str, method: str, value: float | None, seed: int, sft: str
) -> list[dict]:
    """Make one run, if it is not done; return a row for each of its evaluations."""
    from dpo_jax import config as configs
    from dpo_jax.pipeline.stages import run_stages
    from dpo_jax.training.metrics import read_rows

    began = time.monotonic()
    config, stage = config_of(panel, method, value, seed, sft)
    with contextlib.redirect_stdout(io.StringIO()):
        run_stages(config, str(folder))
    trained = folder / configs.folder_names(config)[stage]
    about = about_of(panel, method, value, seed)
    rows = []
    for row in read_rows(trained / "metrics.jsonl"):
        # At step 0 every policy is the reference, which has a row of its own.
        if row["step"] and "frontier/kl" in row:
            measured = dict(reward=row["frontier/reward"], kl=row["frontier/kl"])
            rows.append(about | dict(step=row["step"]) | measured)
    last, seconds = rows[-1], time.monotonic() - began
    print(
        f"{panel} seed {seed}: {method} {about['parameter']:<12} reward {last['reward']:.3f}  "
        f"KL {last['kl']:.3f}  ({seconds:.0f} s)",
        flush=True,
    )
    return rows


def about_of(panel: str, method: str, value: float | None, seed: int | None) -> dict:
    """Return what says which run a row is of."""
    labels = dict(best_of_n="N={:g}", rm_optimum="β={:g}", label_optimum="β={:g}")
    label = labels[method] if method in labels else SWEEPS.get(method, (None, (), ""))[2]
    parameter = "" if value is None else label.format(value)
    return dict(panel=panel, method=method, parameter=parameter, value=value, seed=seed)


def optima(panel: str, method: str, seed: int, sft: str, learned_PC: np.ndarray) -> list[dict]:
    """Return rows of the optimal policies of rewards that a seed's labels have led to."""
    from dpo_jax.evaluation import exact

    reference_PC, rewards_PC = toy_runs.policy_of(sft, PANELS[panel][2])
    rows = []
    for beta in RM_BETAS:
        reward, kl = exact.optimum(reference_PC, rewards_PC, beta, learned_PC)
        about = about_of(panel, method, beta, seed)
        rows.append(about | dict(step=0, reward=reward, kl=kl))
    return rows


def rows_without_seed(panel: str, sft: str) -> list[dict]:
    """Return rows of the reference, of best of N and of Preferred-FT's closed form.

    They follow from the SFT model alone, and are exact.
    """
    from dpo_jax.evaluation import exact

    _, labels, reward_name = PANELS[panel]
    reference_PC, rewards_PC = toy_runs.policy_of(sft, reward_name)
    start, _ = exact.reward_and_kl(reference_PC, reference_PC, rewards_PC)
    points = [("reference", None, (start, 0.0))]
    for n in BEST_OF:
        points.append(("best_of_n", n, exact.best_of_n(reference_PC, rewards_PC, n)))
    closed_form = exact.preferred_ft(reference_PC, rewards_PC, labels)
    points.append(("preferred_ft_closed_form", None, closed_form))
    rows = []
    for method, value, (reward, kl) in points:
        about = about_of(panel, method, value, None)
        rows.append(about | dict(step=0, reward=float(reward), kl=float(kl)))
    return rows


def add_bounds(rows: list[dict], panel: str, sft: str) -> None:
    """Add to a panel's rows their gap to the bound, and the optimum that DPO aims at."""
    from dpo_jax.evaluation import exact

    reference_PC, rewards_PC = toy_runs.policy_of(sft, PANELS[panel][2])
    bounds = exact.bound(reference_PC, rewards_PC, [row["kl"] for row in rows])
    optima = {}
    for row, bound in zip(rows, bounds, strict=True):
        row["gap"] = float(bound) - row["reward"]
        if row["method"] in AIMED:
            beta = row["value"]
            if beta not in optima:
                optima[beta] = exact.optimum(reference_PC, rewards_PC, beta)
            row["analytic_reward"], row["analytic_kl"] = optima[beta]


def closed_forms(panel: str, sft: str) -> dict:
    """Return a Curve of best of N by its name, for N between whole numbers too.

    Its distribution of rewards is F^N with that of one sample, F, whatever the N.
    """
    from dpo_jax.evaluation import exact
    from dpo_jax.evaluation.frontier import Curve

    reference_PC, rewards_PC = toy_runs.policy_of(sft, PANELS[panel][2])
    found = [exact.best_of_n(reference_PC, rewards_PC, n) for n in CLOSED_NS]
    rewards, kls = np.transpose(found)
    # Of N = 1, rounding takes the KL below 0.
    return dict(best_of_n=Curve(kls.clip(0), rewards))


def write_costs(workdir: str, panel: str, methods: list[str], sft: str, at_matched_kl: list[dict]):
    """Write what a run of each method takes, on a panel's first seed, beside its reward at a KL.

    at_matched_kl: rows of rewards, means over all seeds.
    """
    from dpo_jax.evaluation import tables

    runs = {}
    for method in methods:
        values = SWEEPS[method][1]
        runs[method] = [config_of(panel, method, value, 0, sft)[0] for value in values]
    at_kl = {}
    for row in at_matched_kl:
        if (row["panel"], row["kl"]) == (panel, COSTS_KL):
            at_kl[row["method"]] = row["reward"]
    found = cost_table.rows_of(pathlib.Path(workdir) / f"{panel}-0", runs)
    for row in found:
        row["reward"] = at_kl.get(row["method"])
    column = tables.Column(f"reward at {COSTS_KL:g} nats, mean over seeds", "reward", "z.3f")
    tables.write(pathlib.Path(workdir) / "costs", found, [*cost_table.COLUMNS, column])


def table(rows: list[dict]) -> str:
    """Return the ends of all runs over seeds as a table for a person."""
    heading = f"{'panel':<6}{'method':<26}{'':<12}{'seeds':>5}{'reward':>9}{'KL':>9}{'gap':>9}"
    lines = [f"{heading}{'worst':>9}   off its optimum, at most"]
    for row in frontier_file.over_seeds(rows):
        line = f"{row['panel']:<6}{row['method']:<26}{row['parameter']:<12}{row['seeds'] or '':>5}"
        line += f"{row['reward']:>9.3f}{row['kl']:>9.3f}{row['gap']:>9.4f}{row['gap_worst']:>9.4f}"
        if "kl_off_worst" in row:
            line += f"   {row['reward_off_worst']:.3f} / {row['kl_off_worst']:.3f}"
        lines.append(line)
    return "\n".join(lines)


def parts(seeds: int, jobs: int) -> list[list[int]]:
    """Return the seeds of each process: a process compiles once for all of its seeds."""
    return [list(range(first, seeds, jobs)) for first in range(min(jobs, seeds))]


def run(workdir: str, panels: dict[str, int], methods: list[str], jobs: int) -> list[dict]:
    """Run as many seeds of each panel as it says; write the rows, the tables and the figure."""
    from dpo_jax.console import say
    from dpo_jax.evaluation.frontier import Curve

    began = time.monotonic()
    sft = shared_sft(workdir)
    tasks = [
        (workdir, panel, methods, part, sft)
        for panel, seeds in panels.items()
        for part in parts(seeds, jobs)
    ]
    found = toy_runs.rows_of_tasks(run_seeds, tasks, jobs)
    rows = []
    curves = {}
    closed = {}
    for panel in panels:
        of_panel = rows_without_seed(panel, sft) + [row for row in found if row["panel"] == panel]
        add_bounds(of_panel, panel, sft)
        rows += of_panel
        largest = 1.05 * max(row["kl"] for row in of_panel)
        policy = toy_runs.policy_of(sft, PANELS[panel][2])
        curves[panel] = Curve(*toy_runs.bound_curve(*policy, largest))
        closed[panel] = closed_forms(panel, sft)
    frontier_file.write(
        pathlib.Path(workdir),
        rows,
        curves,
        {panel: PANELS[panel][0] for panel in panels},
        curve_name="highest reward at this KL (exact)",
        closed_forms=closed,
    )
    at_matched_kl = frontier_file.at_matched_kl(rows, curves, closed)
    write_costs(workdir, next(iter(panels)), methods, sft, at_matched_kl)
    print(table(rows))
    say(f"{workdir}/frontier.json, {workdir}/frontier.png: {time.monotonic() - began:.0f} s")
    return rows


def seeds_of(panels: list[str], given: list[str]) -> dict[str, int]:
    """Return the number of seeds of each panel, as --seeds gives them. Raises ValueError."""
    numbers = [int(text) if text.isdecimal() else 0 for text in given]
    if len(numbers) == 1:
        numbers *= len(panels)
    if len(numbers) != len(panels) or min(numbers) < 1:
        raise ValueError(
            f"--seeds={','.join(given)} is for {len(panels)} panels: expected a number from 1 on, "
            "or one for each panel, such as --seeds=10,3,3."
        )
    return dict(zip(panels, numbers, strict=True))


def main():
    from absl import flags

    from dpo_jax import command_line
    from dpo_jax.parallel import processes

    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs and the results.")
    panels = flags.DEFINE_multi_enum(
        "panel", list(PANELS), list(PANELS), "A panel to make; may be repeated. Default: all."
    )
    seeds = flags.DEFINE_list(
        "seeds", ["2"], "Number of seeds of each panel; or several, one for each panel in turn."
    )
    methods = flags.DEFINE_multi_enum(
        "method", list(SWEEPS), list(SWEEPS), "A method to run; may be repeated. Default: all."
    )
    jobs = flags.DEFINE_integer("jobs", 2, "Number of processes.", lower_bound=1)
    flags.mark_flags_as_required(["workdir"])
    processes.start()

    def make_panels():
        with in_workdir(workdir.value) as folder:
            run(folder, seeds_of(panels.value, seeds.value), methods.value, jobs.value)

    command_line.run(make_panels, __doc__)


if __name__ == "__main__":
    main()
