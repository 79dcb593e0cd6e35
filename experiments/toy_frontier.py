"""The reward/KL frontier of every method on the toy, exact: python -m experiments.toy_frontier
--workdir=DIR

All completions are enumerated, so each policy's reward and KL, and the highest reward at a KL, are
exact (the paper's figure 2, left, has samples). Panels: (a) additive reward, Bradley-Terry labels,
two seeds; (b) deterministic labels; (c) a reward that saturates. Every run is an ordinary run of
dpo_jax.train in DIR/PANEL-SEED, so what is finished is reused; runs of one process share their
compiled steps. Writes DIR/frontier.json, a row per run and checkpoint, and DIR/frontier.png.
"""

import contextlib
import io
import json
import multiprocessing
import os
import pathlib
import time

import numpy as np

PANELS = {  # panel -> (title, labels, reward, seeds)
    "a": ("(a) additive reward, Bradley-Terry labels", "bradley_terry", "toy", (0, 1)),
    "b": ("(b) additive reward, deterministic labels", "deterministic", "toy", (0,)),
    "c": ("(c) saturating reward, Bradley-Terry labels", "bradley_terry", "toy_saturating", (0,)),
}
SWEEPS = {  # method -> (field, values, how a value is written)
    "dpo": ("dpo.beta", (5.0, 2.0, 1.0, 0.5, 0.25, 0.1, 0.05), "β={:g}"),
    "unlikelihood": ("unlikelihood.alpha", (0.05, 0.1, 0.5, 1.0), "α={:g}"),
    "preferred_ft": (None, (None,), ""),
    "ppo": ("ppo.target_kl", (0.5, 1.0, 3.0, 6.0), "target {:g}"),
    "ppo_gt": ("ppo.target_kl", (0.5, 1.0, 3.0, 6.0), "target {:g}"),
}
STEPS = {
    "dpo": 240,
    "unlikelihood": 240,
    "preferred_ft": 240,
    "rm": 240,
    "ppo": 27,
}  # evaluated at each third
BEST_OF = (1, 4, 16, 64, 128)
RM_BETAS = (5.0, 2.0, 1.0, 0.5, 0.25)  # of the optimal policies for the learned reward
CURVE_POINTS = 200


def config_of(panel: str, method: str, value: float | None, seed: int):
    """The config of one run, and the stage that trains it."""
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
        config.dpo.cache_reference = True  # its seven runs share it
    field, _, _ = SWEEPS[method]
    stage = "ppo" if method == "ppo_gt" else method
    if field:
        config[stage][field.partition(".")[2]] = value
    config.run = method + ("" if value is None else f"_{value:g}")
    if config.run in config:  # a stage's own name
        config.run += "_run"
    return config, stage


def run_seed(workdir: str, panel: str, seed: int) -> list[dict]:
    """All runs of a panel with one seed, and what follows from its reference without training."""
    from dpo_jax import config as configs
    from dpo_jax.pipeline.stages import run_stages
    from dpo_jax.training.metrics import read_rows

    folder = pathlib.Path(workdir) / f"{panel}-{seed}"
    rows = []
    sweeps = list(SWEEPS.items())
    for method, (_, values, label) in (
        sweeps[::-1] if seed % 2 else sweeps
    ):  # two seeds at once compile half each
        for value in values:
            began = time.monotonic()
            config, stage = config_of(panel, method, value, seed)
            with contextlib.redirect_stdout(io.StringIO()):
                run_stages(config, str(folder))
            trained = folder / configs.folder_names(config)[stage]
            found = [
                dict(
                    panel=panel,
                    method=method,
                    parameter=label.format(value) if value else "",
                    seed=seed,
                    step=row["step"],
                    reward=row["frontier/reward"],
                    kl=row["frontier/kl"],
                    **({"beta": value} if method == "dpo" else {}),
                )
                for row in read_rows(trained / "metrics.jsonl")
                if row["step"] and "frontier/kl" in row
            ]
            rows += found
            print(
                f"{panel} seed {seed}: {method} {found[-1]['parameter']:<12} reward {found[-1]['reward']:.3f}  "
                f"KL {found[-1]['kl']:.3f}  ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
    return rows + exact_rows(folder, panel, seed, rows)


def exact_rows(folder: pathlib.Path, panel: str, seed: int, runs: list[dict]) -> list[dict]:
    """Best of N, the optima for the learned reward, and of each run its gap to the bound (in
    place).
    """
    from dpo_jax.data import toy
    from dpo_jax.evaluation import exact
    from dpo_jax.evaluation.toy_report import exact_reference
    from dpo_jax.models import loading
    from dpo_jax.parallel import sharding
    from dpo_jax.rewards import make

    mesh = sharding.make_mesh()
    sft = loading.open_checkpoint(str(folder / "sft" / "hf"))
    reference_PC, rewards_PC = exact_reference(sft.load(mesh), PANELS[panel][2])
    prompts_P, ids_CT = toy.PROMPTS, toy.completions()
    score = make.make_reward("rm", str(folder / "rm" / "hf"), 4096, mesh)
    learned_PC = np.stack(
        [
            score(
                (), (), [(np.array([prompt], np.int32), ids_T) for ids_T in ids_CT.astype(np.int32)]
            )
            for prompt in prompts_P
        ]
    )
    points = [
        ("best_of_n", f"N={n}", exact.best_of_n(reference_PC, rewards_PC, n)) for n in BEST_OF
    ]
    points += [
        ("rm_optimum", f"β={beta:g}", exact.optimum(reference_PC, rewards_PC, beta, learned_PC))
        for beta in RM_BETAS
    ]
    points.append(
        (
            "preferred_ft_closed_form",
            "",
            exact.preferred_ft(reference_PC, rewards_PC, PANELS[panel][1]),
        )
    )
    found = [
        dict(
            panel=panel, method=method, parameter=parameter, seed=seed, step=0, reward=reward, kl=kl
        )
        for method, parameter, (reward, kl) in points
    ]
    for row in [*runs, *found]:
        row["gap"] = float(exact.bound(reference_PC, rewards_PC, [row["kl"]])[0]) - row["reward"]
        if row["method"] == "dpo":
            row["analytic_reward"], row["analytic_kl"] = exact.optimum(
                reference_PC, rewards_PC, row.pop("beta")
            )
    return found


def curve(workdir: str, panel: str, largest: float) -> tuple[np.ndarray, np.ndarray]:
    """The bound of a panel's first seed up to a KL."""
    from dpo_jax.evaluation import exact
    from dpo_jax.evaluation.toy_report import exact_reference
    from dpo_jax.models import loading
    from dpo_jax.parallel import sharding

    sft = loading.open_checkpoint(
        str(pathlib.Path(workdir) / f"{panel}-{PANELS[panel][3][0]}" / "sft" / "hf")
    )
    reference_PC, rewards_PC = exact_reference(sft.load(sharding.make_mesh()), PANELS[panel][2])
    kls = largest * np.linspace(0, 1, CURVE_POINTS) ** 2
    return kls, exact.bound(reference_PC, rewards_PC, kls)


def table(rows: list[dict]) -> str:
    """The end of each run, by panel and gap."""
    last = {}
    for row in rows:
        last[row["panel"], row["method"], row["parameter"], row["seed"]] = row
    lines = [
        f"{'panel':<6}{'method':<26}{'':<12}{'seed':>4}{'reward':>9}{'KL':>9}{'gap':>9}   optimum for its β"
    ]
    for row in sorted(
        last.values(), key=lambda row: (row["panel"], row["method"], row["seed"], row["kl"])
    ):
        analytic = (
            f"   {row['analytic_reward']:.3f} / {row['analytic_kl']:.3f}"
            if "analytic_kl" in row
            else ""
        )
        lines.append(
            f"{row['panel']:<6}{row['method']:<26}{row['parameter']:<12}{row['seed']:>4}{row['reward']:>9.3f}"
            f"{row['kl']:>9.3f}{row['gap']:>9.4f}{analytic}"
        )
    return "\n".join(lines)


def run(workdir: str, panels: list[str], jobs: int) -> list[dict]:
    """Runs the panels, a process for each seed, and writes frontier.json and frontier.png."""
    from dpo_jax.evaluation import plots

    began = time.monotonic()
    tasks = [(workdir, panel, seed) for panel in panels for seed in PANELS[panel][3]]
    if jobs == 1:
        found = [run_seed(*task) for task in tasks]
    else:
        with multiprocessing.get_context("spawn").Pool(
            jobs, initializer=_one_thread, maxtasksperchild=1
        ) as pool:
            found = pool.starmap(run_seed, tasks, chunksize=1)
    rows = [row for part in found for row in part]
    (pathlib.Path(workdir) / "frontier.json").write_text(json.dumps(rows, indent=1) + "\n")
    curves = {
        panel: curve(workdir, panel, 1.05 * max(row["kl"] for row in rows if row["panel"] == panel))
        for panel in panels
    }
    plots.panels(
        pathlib.Path(workdir) / "frontier.png",
        rows,
        curves,
        {panel: PANELS[panel][0] for panel in panels},
        curve_name="highest reward at this KL (exact, first seed)",
    )
    print(table(rows))
    print(f"{workdir}/frontier.json, {workdir}/frontier.png: {time.monotonic() - began:.0f} s")
    return rows


def _one_thread():
    """These steps are too small to share between cores: a process each is faster. Nor does fusion
    pay for its compilation, which would be a third of the time.
    """
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
        " --xla_cpu_use_fusion_emitters=false"
    )
    from dpo_jax.parallel import processes

    processes.start()


def main():
    from absl import flags

    from dpo_jax import command_line
    from dpo_jax.parallel import processes

    workdir = flags.DEFINE_string("workdir", None, "Where the runs and the results are.")
    panels = flags.DEFINE_multi_enum(
        "panel", list(PANELS), list(PANELS), "Which panels; may be repeated."
    )
    jobs = flags.DEFINE_integer("jobs", 2, "Processes.")
    flags.mark_flags_as_required(["workdir"])
    processes.start()

    def make_panels():
        run(workdir.value, panels.value, jobs.value)

    command_line.run(make_panels, __doc__)


if __name__ == "__main__":
    main()
