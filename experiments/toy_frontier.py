"""Draw the exact reward/KL frontier of every method on the toy.

    python -m experiments.toy_frontier --workdir=DIR

All completions are enumerated, so the rewards, the KLs and the highest reward at each KL are exact
(the paper's figure 2, left, relies on samples). Panels: (a) additive reward, Bradley-Terry labels,
two seeds; (b) deterministic labels; (c) a reward that saturates.

Every run is an ordinary run of dpo_jax.train in DIR/PANEL-SEED, so finished runs are reused. Runs
of one process share their compiled steps. Writes DIR/frontier.json, with a row per run and
checkpoint, and DIR/frontier.png.
"""

import contextlib
import io
import json
import pathlib
import time

import numpy as np

from experiments import toy_runs
from experiments.commands import in_workdir

# Panel -> (title, labels, reward, seeds).
PANELS = {
    "a": ("(a) additive reward, Bradley-Terry labels", "bradley_terry", "toy", (0, 1)),
    "b": ("(b) additive reward, deterministic labels", "deterministic", "toy", (0,)),
    "c": ("(c) saturating reward, Bradley-Terry labels", "bradley_terry", "toy_saturating", (0,)),
}
# Method -> (swept field, its values, how a value is written).
SWEEPS = {
    "dpo": ("dpo.beta", (5.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.05), "β={:g}"),
    "unlikelihood": ("unlikelihood.alpha", (0.05, 0.1, 0.5, 1.0), "α={:g}"),
    "preferred_ft": (None, (None,), ""),
    "ppo": ("ppo.target_kl", (0.5, 1.0, 3.0, 6.0), "target {:g}"),
    "ppo_gt": ("ppo.target_kl", (0.5, 1.0, 3.0, 6.0), "target {:g}"),
}
# Stage -> steps; each is evaluated after every third of them.
STEPS = {"dpo": 240, "unlikelihood": 240, "preferred_ft": 240, "rm": 240, "ppo": 27}
BEST_OF = (1, 4, 16, 64, 128)
RM_BETAS = (5.0, 2.0, 1.0, 0.5, 0.25)  # for the optimal policies of the learned reward


def config_of(panel: str, method: str, value: float | None, seed: int):
    """Return the config of one run, and the stage that trains it."""
    from configs import toy

    _, labels, reward, _ = PANELS[panel]
    config = toy.get_config(method)
    config.seed = seed
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


def run_seed(workdir: str, panel: str, seed: int) -> list[dict]:
    """Make all runs of a panel with one seed; return their rows and those that need no training."""
    from dpo_jax import config as configs
    from dpo_jax.pipeline.stages import run_stages
    from dpo_jax.training.metrics import read_rows

    folder = pathlib.Path(workdir) / f"{panel}-{seed}"
    rows = []
    sweeps = list(SWEEPS.items())
    if seed % 2:
        sweeps.reverse()  # two seeds at a time then compile half of the programs each
    for method, (_, values, label) in sweeps:
        for value in values:
            began = time.monotonic()
            config, stage = config_of(panel, method, value, seed)
            with contextlib.redirect_stdout(io.StringIO()):
                run_stages(config, str(folder))
            trained = folder / configs.folder_names(config)[stage]
            parameter = label.format(value) if value else ""
            about = dict(panel=panel, method=method, parameter=parameter, seed=seed)
            for row in read_rows(trained / "metrics.jsonl"):
                if row["step"] == 0 or "frontier/kl" not in row:
                    continue
                measured = dict(
                    step=row["step"], reward=row["frontier/reward"], kl=row["frontier/kl"]
                )
                if method == "dpo":
                    measured["beta"] = value
                rows.append(about | measured)
            last, seconds = rows[-1], time.monotonic() - began
            print(
                f"{panel} seed {seed}: {method} {parameter:<12} reward {last['reward']:.3f}  "
                f"KL {last['kl']:.3f}  ({seconds:.0f} s)",
                flush=True,
            )
    return rows + exact_rows(folder, panel, seed, rows)


def exact_rows(folder: pathlib.Path, panel: str, seed: int, runs: list[dict]) -> list[dict]:
    """Return rows of best of N, of the learned reward's optima and of Preferred-FT's closed form.

    Adds to every row, those of `runs` too, its gap to the bound.
    """
    from dpo_jax.data import toy
    from dpo_jax.evaluation import exact
    from dpo_jax.parallel import sharding
    from dpo_jax.rewards import make

    reference_PC, rewards_PC = toy_runs.first_policy(folder, PANELS[panel][2])
    prompts_P, ids_CT = toy.PROMPTS, toy.completions()
    learned_reward = make.make_reward("rm", str(folder / "rm" / "hf"), 4096, sharding.make_mesh())
    learned = []
    for prompt in prompts_P:
        prompt_ids = np.array([prompt], np.int32)
        tokens = [(prompt_ids, ids_T) for ids_T in ids_CT.astype(np.int32)]
        learned.append(learned_reward((), (), tokens))
    learned_PC = np.stack(learned)

    points = []
    for n in BEST_OF:
        points.append(("best_of_n", f"N={n}", exact.best_of_n(reference_PC, rewards_PC, n)))
    for beta in RM_BETAS:
        optimum = exact.optimum(reference_PC, rewards_PC, beta, learned_PC)
        points.append(("rm_optimum", f"β={beta:g}", optimum))
    closed_form = exact.preferred_ft(reference_PC, rewards_PC, PANELS[panel][1])
    points.append(("preferred_ft_closed_form", "", closed_form))

    rows = []
    for method, parameter, (reward, kl) in points:
        about = dict(panel=panel, method=method, parameter=parameter, seed=seed)
        rows.append(about | dict(step=0, reward=reward, kl=kl))
    for row in [*runs, *rows]:
        bound = float(exact.bound(reference_PC, rewards_PC, [row["kl"]])[0])
        row["gap"] = bound - row["reward"]
        if row["method"] == "dpo":
            reward, kl = exact.optimum(reference_PC, rewards_PC, row.pop("beta"))
            row["analytic_reward"], row["analytic_kl"] = reward, kl
    return rows


def curve(workdir: str, panel: str, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """Return KLs up to `largest` and the bound at them, for a panel's first seed."""
    _, _, reward, seeds = PANELS[panel]
    policy = toy_runs.first_policy(pathlib.Path(workdir) / f"{panel}-{seeds[0]}", reward)
    return toy_runs.bound_curve(*policy, largest)


def table(rows: list[dict]) -> str:
    """Return the last row of each run as a table."""
    last = {}
    for row in rows:
        last[row["panel"], row["method"], row["parameter"], row["seed"]] = row

    def place(row):
        return row["panel"], row["method"], row["seed"], row["kl"]

    heading = f"{'panel':<6}{'method':<26}{'':<12}{'seed':>4}{'reward':>9}{'KL':>9}{'gap':>9}"
    lines = [f"{heading}   optimum for its β"]
    for row in sorted(last.values(), key=place):
        line = f"{row['panel']:<6}{row['method']:<26}{row['parameter']:<12}{row['seed']:>4}"
        line += f"{row['reward']:>9.3f}{row['kl']:>9.3f}{row['gap']:>9.4f}"
        if "analytic_kl" in row:
            line += f"   {row['analytic_reward']:.3f} / {row['analytic_kl']:.3f}"
        lines.append(line)
    return "\n".join(lines)


def run(workdir: str, panels: list[str], jobs: int) -> list[dict]:
    """Run the panels, one process per seed; write frontier.json and frontier.png."""
    from dpo_jax.console import say
    from dpo_jax.evaluation import plots

    began = time.monotonic()
    tasks = [(workdir, panel, seed) for panel in panels for seed in PANELS[panel][3]]
    rows = toy_runs.rows_of_tasks(run_seed, tasks, jobs)
    (pathlib.Path(workdir) / "frontier.json").write_text(json.dumps(rows, indent=1) + "\n")
    curves = {}
    for panel in panels:
        largest = max(row["kl"] for row in rows if row["panel"] == panel)
        curves[panel] = curve(workdir, panel, 1.05 * largest)
    plots.panels(
        pathlib.Path(workdir) / "frontier.png",
        rows,
        curves,
        {panel: PANELS[panel][0] for panel in panels},
        curve_name="highest reward at this KL (exact, first seed)",
    )
    print(table(rows))
    say(f"{workdir}/frontier.json, {workdir}/frontier.png: {time.monotonic() - began:.0f} s")
    return rows


def main():
    from absl import flags

    from dpo_jax import command_line
    from dpo_jax.parallel import processes

    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs and the results.")
    panels = flags.DEFINE_multi_enum(
        "panel", list(PANELS), list(PANELS), "A panel to make; may be repeated. Default: all."
    )
    jobs = flags.DEFINE_integer("jobs", 2, "Number of processes.")
    flags.mark_flags_as_required(["workdir"])
    processes.start()

    def make_panels():
        with in_workdir(workdir.value) as folder:
            run(folder, panels.value, jobs.value)

    command_line.run(make_panels, __doc__)


if __name__ == "__main__":
    main()
