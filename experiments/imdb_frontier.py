"""Reproduce the paper's figure 2, left: reward against KL on IMDb.

    python -m experiments.imdb_frontier --config=FILE --workdir=DIR
    python -m experiments.imdb_frontier --config=FILE --workdir=DIR --run='dpo_*' --seeds=3

Makes 22 runs over one SFT model and one set of pairs: DPO at 4 betas, unlikelihood at 4 alphas, PPO
on the learned reward, on the true one, and on the true one by TRL's settings at 4 target KLs each,
and Preferred-FT with 2 seeds. (The paper gives the values and the sum of 22 runs; that TRL's PPO
has the same 4 target KLs, and Preferred-FT the 2 runs that remain, is inferred.) best_of_n is made
beside them: it is not in the paper's figure for IMDb, and its samples give the optimum, as
estimated from the reference. Each run is evaluated while it trains. Every run is an ordinary run of
dpo_jax.train in DIR, so finished runs are reused and interrupted ones resume.

--run=NAME picks runs, with * for any letters, and may be repeated. --seeds=N makes N seeds of each
run that is picked, by the seed of the stage that trains it (dpo.seed): all start from one SFT
model, and learn from one set of pairs. --dry_run lists the runs, whether they are done, and what
each will cost. --config.FIELD=VALUE changes a field of every run that has it.

After each run the results of all runs in DIR are written: frontier.json, with a row per run and
checkpoint and the optimum's curve (see frontier_file.py), frontier.png and .pdf; as .csv, .md and
.tex the tables frontier (the ends, over seeds), comparisons (on the same prompts, and at equal KL),
matched_kl (methods at equal KL) and costs; prompts.csv, reward and KL of each run at each test
prompt; and completions.md, what each run says to the first prompts.
"""

import fnmatch
import json
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dpo_jax.data.batches import steps_of
from experiments.commands import config_maker, in_workdir

PANEL = "imdb"
TITLE = "controlled sentiment on IMDb"
NOT_IN_PAPER = "\n(best of N is not in the paper's figure)"
# Method -> (swept field, its values, how a value is written).
SWEEP = {
    "dpo": ("dpo.beta", (0.05, 0.1, 1.0, 5.0), "β={:g}"),
    "unlikelihood": ("unlikelihood.alpha", (0.05, 0.1, 0.5, 1.0), "α={:g}"),
    "ppo_gt": ("ppo.target_kl", (3.0, 6.0, 9.0, 12.0), "target {:g}"),
    "ppo": ("ppo.target_kl", (3.0, 6.0, 9.0, 12.0), "target {:g}"),
    "ppo_gt_trl": ("ppo.target_kl", (3.0, 6.0, 9.0, 12.0), "target {:g}"),
    "preferred_ft": ("", (None,), ""),
}
SEEDS = {"preferred_ft": 2}  # as many as the paper has; of other methods it has one
BEST_OF_N = "best_of_n"  # the run that trains nothing
SHOWN = 10  # prompts in completions.md
REVIEWS = 25_000  # in IMDb's train split; each gives one prompt
MEASURED = (
    "reward",
    "reward_se",
    "kl",
    "kl_se",
    "kl_sampled",
    "kl_sampled_se",
    "length",
    "eos_rate",
    "repetition",
)


class Run(NamedTuple):
    """One run: a method, the value of its swept field, and a seed of its training."""

    method: str
    value: float | None
    seed: int = 0

    @property
    def base(self) -> str:
        """The name of the run with the first seed."""
        return self._replace(seed=0).name

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        if self.value is None:
            return f"{self.method}_{self.seed}"
        name = f"{self.method}_{self.value:g}"
        return f"{name}_seed{self.seed}" if self.seed else name

    @property
    def parameter(self) -> str:
        """The value as a figure writes it."""
        return "" if self.value is None else SWEEP[self.method][2].format(self.value)

    @property
    def stage(self) -> str:
        """The stage that trains it."""
        return "ppo" if self.method.startswith("ppo") else self.method


def points() -> list[Run]:
    """Return the first seed of every run."""
    return [Run(method, value) for method, (_, values, _) in SWEEP.items() for value in values]


def chosen(patterns: list[str], seeds: int) -> list[Run]:
    """Return the runs that are to be made, with their seeds.

    A pattern that a run's name without its seed fits picks all of its seeds. Raises ValueError for
    a pattern that fits nothing.
    """
    known = []
    for point in points():
        for seed in range(max(seeds, SEEDS.get(point.method, 1))):
            known.append(point._replace(seed=seed))
    found = set()
    for pattern in patterns:
        fits = [
            run
            for run in known
            if fnmatch.fnmatch(run.base, pattern) or fnmatch.fnmatch(run.name, pattern)
        ]
        if not fits and not fnmatch.fnmatch(BEST_OF_N, pattern):
            names = ", ".join([*(run.name for run in known), BEST_OF_N])
            raise ValueError(
                f"--run={pattern} matches no run. With --seeds={seeds} the runs are: {names}."
            )
        found.update(fits)
    return [run for run in known if run in found]


def runs_in(folder: pathlib.Path) -> list[Run]:
    """Return the runs that have begun in a folder, in the order of `points`."""
    found = []
    for point in points():
        seeds = {0}
        stem = point._replace(seed=1).name.removesuffix("1")
        for path in folder.glob(f"{stem}*"):
            number = path.name.removeprefix(stem)
            if number.isdecimal():
                seeds.add(int(number))
        for seed in sorted(seeds):
            run = point._replace(seed=seed)
            if (folder / run.name / "metrics.jsonl").exists():
                found.append(run)
    return found


def config_of(make_config, run: Run):
    """Return the config of a run."""
    config = make_config(run.method)
    field = SWEEP[run.method][0].rpartition(".")[2]
    if field:
        config[run.stage][field] = run.value
    # A seed that is given for all runs is that of the first.
    config[run.stage].seed += run.seed
    if run.stage == "dpo":
        config.dpo.cache_reference = True  # the runs share the reference's log-probs
    config.run = run.name
    return config


def refuse_swept(overrides: dict[str, str]) -> None:
    """Raise ValueError for an override of a field that this experiment sweeps."""
    swept = {field: values for field, values, _ in SWEEP.values() if field}
    for field in overrides:
        if field in swept:
            values = ", ".join(f"{value:g}" for value in swept[field])
            raise ValueError(
                f"--config.{field} would do nothing: the experiment itself sets {field} to "
                f"{values}, one run each. Pick runs by --run, such as --run='{_run_of(field)}'."
            )


def _run_of(field: str) -> str:
    """Return the name of a run that sweeps a field."""
    return next(run.name for run in points() if SWEEP[run.method][0] == field)


def cost(config, stage: str) -> str:
    """Say what a run has to do after the stages that it shares with others."""
    block, sampling = config[stage], config.sampling
    if stage == "ppo":
        steps = steps_of(REVIEWS, block.batch_size, steps=block.steps, epochs=block.epochs)
        return (
            f"{steps} steps: {steps * block.batch_size:,} completions of up to "
            f"{sampling.max_new_tokens} tokens, {block.inner_epochs} passes over each"
        )
    size = 1 + sampling.max_prefix + sampling.max_new_tokens  # BOS, the prompt, the completion
    pairs = config.pairs.prompts * math.comb(config.pairs.completions, 2)
    steps = steps_of(pairs, block.batch_size, steps=block.steps, epochs=block.epochs)
    return f"{steps} steps: {steps * block.batch_size:,} pairs of up to {size} tokens"


def rows_of(folder: pathlib.Path, config, run: Run) -> list[dict]:
    """Return a row for each evaluation of a run, as frontier.json has them.

    Each says by "prompts" what it was measured on: validation prompts while the run trained, and
    test prompts for the finished policy, in the place of the last evaluation; with keep_best, of
    the one that was the best, which ends the rows.
    """
    from dpo_jax import config as configs
    from dpo_jax import runs
    from dpo_jax.training.metrics import read_rows

    names = configs.folder_names(config)
    trained = runs.read_stage(folder / names[run.stage], folder)
    about = dict(
        panel=PANEL,
        method=run.method,
        parameter=run.parameter,
        value=run.value,
        seed=trained.depends_on["seed"] + trained.depends_on[f"{run.stage}.seed"],
    )
    rows = []
    for row in read_rows(trained.folder / "metrics.jsonl"):
        # At step 0 the policy is the reference, which has a row of its own.
        if row["step"] and "frontier/kl" in row:
            of_step = dict(step=row["step"], prompts="validation")
            rows.append(about | of_step | measured_in(row))
    evaluated = folder / names["evaluate"] / "evaluate.json"
    if rows and evaluated.exists():
        # How many rows there are up to the evaluation of the policy that was kept.
        kept_kl = trained.evaluation.get("frontier/kl")
        lengths = [number for number, row in enumerate(rows, 1) if row["kl"] == kept_kl]
        if lengths:
            rows = rows[: lengths[-1]]
        rows[-1] |= dict(prompts="test") | measured_in(json.loads(evaluated.read_text()))
    return rows


def measured_in(values: dict) -> dict:
    """Return what an evaluation has measured of a policy, by the names of frontier.json.

    It has no errors where there was one prompt.
    """
    return {name: values[f"frontier/{name}"] for name in MEASURED if f"frontier/{name}" in values}


def evaluated_runs(folder: pathlib.Path, made: dict) -> Iterator[tuple[Run, pathlib.Path]]:
    """Yield each run that has been evaluated on the test prompts, and the folder of that stage.

    made: Run -> its config.
    """
    from dpo_jax import config as configs

    for run, config in made.items():
        evaluated = folder / configs.folder_names(config)["evaluate"]
        if (evaluated / "done.json").exists():
            yield run, evaluated


def rows_of_prompts(folder: pathlib.Path, made: dict) -> list[dict]:
    """Return reward and KL of finished runs and of the reference at each test prompt.

    made: Run -> its config. Each row has run, method, parameter, prompt, reward and kl. prompt is a
    number, equal for equal prompts. The reference comes first. Raises ValueError where a run was
    evaluated on other prompts than those before it.
    """
    from dpo_jax.workdir import COMPLETIONS, REFERENCE_COMPLETIONS, read_lines

    evaluations = []  # run, method, parameter, completions
    prompts = None
    for run, evaluated in evaluated_runs(folder, made):
        completions = read_lines(evaluated / COMPLETIONS)
        texts = [row["prompt"] for row in completions]
        if prompts is None:
            prompts = texts
            reference = read_lines(evaluated / REFERENCE_COMPLETIONS)
            evaluations.append(("reference", "reference", "", reference))
        if texts != prompts:
            raise ValueError(
                f"{evaluated} has other prompts than the runs before it: expected the same in "
                "every run, which are compared prompt by prompt. Make it again with their "
                "config.evaluate.prompts and config.data."
            )
        evaluations.append((run.name, run.method, run.parameter, completions))
    rows = []
    for run, method, parameter, completions in evaluations:
        about = dict(run=run, method=method, parameter=parameter)
        for text, completion in zip(prompts, completions, strict=True):
            measured = dict(reward=completion["reward"], kl=completion["kl"])
            rows.append(about | dict(prompt=prompts.index(text)) | measured)
    return rows


def ends_of(rows: list[dict]) -> tuple[list, np.ndarray | None, list[int] | None]:
    """Return the ends of finished runs at each prompt, the reference's rewards there, the prompts.

    rows: as of `rows_of_prompts`. Seeds of a run are averaged, prompt by prompt.
    """
    from experiments.comparisons import End

    runs = {}
    for row in rows:
        runs.setdefault((row["method"], row["parameter"]), {}).setdefault(row["run"], []).append(
            row
        )
    if not runs:
        return [], None, None
    (reference,) = runs.pop(("reference", "")).values()
    ends = []
    for (method, parameter), seeds in runs.items():
        means = {}
        for name in ("reward", "kl"):
            of_seeds = [[row[name] for row in of_seed] for of_seed in seeds.values()]
            means[name] = np.mean(of_seeds, axis=0)
        ends.append(End(method, parameter, means["reward"], means["kl"], len(seeds)))
    reference_U = np.array([row["reward"] for row in reference])
    return ends, reference_U, [row["prompt"] for row in reference]


def completions_page(folder: pathlib.Path, made: dict) -> str:
    """Return what the reference and the finished runs say to the first test prompts, as Markdown.

    made: Run -> its config. Of the seeds of a run the first is shown.
    """
    from dpo_jax.workdir import COMPLETIONS, REFERENCE_COMPLETIONS, read_lines

    of_names = {}
    for run, evaluated in evaluated_runs(folder, made):
        if run.seed:
            continue
        of_names.setdefault("reference", read_lines(evaluated / REFERENCE_COMPLETIONS)[:SHOWN])
        of_names[run.name] = read_lines(evaluated / COMPLETIONS)[:SHOWN]
    lines = [
        "# Completions",
        "",
        f"One sample of each run at temperature 1 for each of the first {SHOWN} test prompts, with "
        "its true reward. All runs start from the reference.",
    ]
    for number, row in enumerate(of_names.get("reference", [])):
        lines += ["", f"## {_as_code(row['prompt'])}", ""]
        for name, rows in of_names.items():
            said = rows[number]
            lines.append(f"- **{name}** ({said['reward']:.2f}) {_as_code(said['completion'])}")
    return "\n".join(lines) + "\n"


def _as_code(text: str) -> str:
    """Return a text as one line of code in Markdown."""
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    without_backticks = line.replace("`", "'")
    return f"`{without_backticks}`"


def best_of_n(folder: pathlib.Path) -> tuple[list[dict], object]:
    """Return rows of best of N and the estimated optimum, from the reference's same samples.

    They are none, and None, before best_of_n is done. The optimum is None, too, where N is too
    small to estimate it.
    """
    from dpo_jax.evaluation import frontier
    from dpo_jax.workdir import read_lines

    made = folder / BEST_OF_N
    if not (made / "done.json").exists():
        return [], None
    rewards, prompts = [], []
    for row in read_lines(made / "completions.jsonl"):
        prompts.append(row["prompt"])
        rewards.append([completion["reward"] for completion in row["completions"]])
    rows = []
    for row in json.loads((made / "best_of_n.json").read_text()):
        n = row["n"]
        about = dict(panel=PANEL, method=BEST_OF_N, parameter=f"N={n}", value=n, seed=None, step=0)
        rows.append(about | {name: row[name] for name in ("reward", "reward_se", "kl")})
    rewards_PM = np.array(rewards)
    if rewards_PM.shape[1] < frontier.FEWEST_SAMPLES:
        return rows, None
    return rows, frontier.frontier(rewards_PM, prompts)


def reference_row(
    folder: pathlib.Path,
    made: dict,
    of_best: list[dict],
    rewards_U: np.ndarray | None,
    prompts: list[int] | None,
) -> dict | None:
    """Return the row of what all runs start from: step 0, at KL 0; None where nothing has begun.

    rewards_U, prompts: its rewards as a finished run's evaluation has them, and the prompt of each.
    Before, it is row 0 of a run, or, without any, best of 1 among the rows of best of N.
    """
    from dpo_jax.evaluation import statistics
    from dpo_jax.training.metrics import read_rows

    about = dict(panel=PANEL, method="reference", parameter="", value=None, seed=None, step=0)
    if rewards_U is not None:
        error = statistics.standard_error(rewards_U, np.array(prompts))
        return about | dict(reward=float(rewards_U.mean()), reward_se=error, kl=0.0)
    for run in made:
        for row in read_rows(folder / run.name / "metrics.jsonl")[:1]:
            if "frontier/reward" in row:
                error = row.get("frontier/reward_se")
                return about | dict(reward=row["frontier/reward"], reward_se=error, kl=0.0)
    for row in of_best:
        if row["value"] == 1:
            return row | about
    return None


def report(make_config, folder: pathlib.Path) -> None:
    """Write the results of all runs in a folder, as far as they are done."""
    from dpo_jax.evaluation import tables
    from dpo_jax.evaluation.frontier import Curve
    from dpo_jax.training.metrics import read_rows
    from experiments import comparisons, cost_table, frontier_file

    made = {run: config_of(make_config, run) for run in runs_in(folder)}
    rows = []
    for run, config in made.items():
        rows += rows_of(folder, config, run)
    of_prompts = rows_of_prompts(folder, made)
    ends, reference_U, prompts = ends_of(of_prompts)
    of_best, optimum = best_of_n(folder)
    start = reference_row(folder, made, of_best, reference_U, prompts)
    if start is None:
        return
    # Without an estimate, all that is known of the optimum is where it begins.
    curve = optimum or Curve(np.zeros(1), np.array([start["reward"]]))
    frontier_file.write(
        folder,
        [start, *rows, *of_best],
        {PANEL: curve},
        {PANEL: TITLE + (NOT_IN_PAPER if of_best else "")},
        curve_name="optimum, estimated from the reference's samples" if optimum else "_",
    )

    if ends:
        finished = [run for run, _ in evaluated_runs(folder, made)]
        beta = make_config("dpo").dpo.beta
        baseline = ("dpo", Run("dpo", beta).parameter)
        compared = comparisons.compare(ends, reference_U, baseline, prompts)
        for row in compared:
            of_row = [run for run in finished if (run.method, run.parameter) == key_of(row)]
            if of_row[0].stage == "ppo":
                kls_of_seeds = []
                for run in of_row:
                    steps = read_rows(folder / run.name / "metrics.jsonl")
                    kls = [step["ppo_train/kl"] for step in steps if "ppo_train/kl" in step]
                    kls_of_seeds.append(kls)
                row |= comparisons.settling(kls_of_seeds)
        of_dpo = comparisons.columns(f"DPO {baseline[1]}")
        tables.write(folder / "comparisons", compared, of_dpo)
        columns = [tables.Column(name, name) for name in of_prompts[0]]
        text = tables.to_csv(of_prompts, columns)
        (folder / "prompts.csv").write_text(text, encoding="utf-8")
        (folder / "completions.md").write_text(completions_page(folder, made), encoding="utf-8")

    trained = {}
    for run, config in made.items():
        if (folder / run.name / "done.json").exists():
            trained.setdefault(run.method, []).append(config)
    if of_best:
        trained[BEST_OF_N] = [make_config(BEST_OF_N)]
    cost_table.write(folder, folder, trained)


def key_of(row: dict) -> tuple[str, str]:
    """Return what tells the runs of a table apart."""
    return row["method"], row["parameter"]


def run(
    make_config, workdir: str, patterns: list[str], *, seeds: int = 1, dry_run: bool = False
) -> None:
    """Make the runs that are not done, and write the results after each; or only list the runs.

    make_config: method -> config. patterns: of the runs to make. Raises ValueError as `chosen` and
    `refuse_other_prompts`.
    """
    from dpo_jax import config_checks, sweep
    from dpo_jax.console import say
    from dpo_jax.training.loop import Diverged

    folder = pathlib.Path(workdir)
    errors = {}

    def make(config) -> None:
        # A run that diverges is drawn as far as it came; the others are still made.
        try:
            sweep.attempt(config, workdir, errors)
        except Diverged as error:
            say(f"{config.run}: {error}")
        report(make_config, folder)

    for of_run in chosen(patterns, seeds):
        config = config_of(make_config, of_run)
        config_checks.validate(config)
        refuse_other_prompts(make_config, folder, config)
        done = (folder / of_run.name / "done.json").exists()
        say(f"{of_run.name:<22}{'done' if done else cost(config, of_run.stage)}")
        if not dry_run:
            make(config)
    if any(fnmatch.fnmatch(BEST_OF_N, pattern) for pattern in patterns):
        config = make_config(BEST_OF_N)
        block = config.best_of_n
        done = (folder / BEST_OF_N / "done.json").exists()
        samples = f"{block.prompts * max(block.n):,} completions of the reference"
        say(f"{BEST_OF_N:<22}{'done' if done else samples}")
        if not dry_run:
            make(config)
    if (folder / "frontier.json").exists() and not dry_run:
        say(f"{folder / 'frontier.json'}, {folder / 'frontier.png'}")


def refuse_other_prompts(make_config, folder: pathlib.Path, config) -> None:
    """Raise ValueError if runs in the folder were evaluated on another number of prompts.

    They could not be compared with this one, which would be known only when it is trained.
    """
    from dpo_jax import runs

    made = {run: config_of(make_config, run) for run in runs_in(folder)}
    for _, evaluated in evaluated_runs(folder, made):
        found = runs.read_stage(evaluated, folder).depends_on["evaluate.prompts"]
        if found != config.evaluate.prompts:
            raise ValueError(
                f"config.evaluate.prompts = {config.evaluate.prompts}, and {evaluated} has "
                f"{found}: expected the same in every run, as they are compared prompt by prompt. "
                f"Give --config.evaluate.prompts={found}, or another --workdir."
            )


def main():
    from absl import flags

    from dpo_jax import command_line, device_command

    config = command_line.define_config("imdb")
    workdir = flags.DEFINE_string("workdir", None, "Folder of the runs and the results.")
    names = flags.DEFINE_multi_string(
        "run", ["*"], "A run to make, such as dpo_0.1 or ppo_*; may be repeated. Default: all."
    )
    seeds = flags.DEFINE_integer(
        "seeds", 1, "Number of seeds of each run that is made.", lower_bound=1
    )
    dry_run = flags.DEFINE_bool("dry_run", False, "Only list the runs and their cost.")
    flags.mark_flags_as_required(["workdir"])

    def make_runs():
        refuse_swept(config.overrides)
        make_config = config_maker(config.choice, config.overrides)
        with in_workdir(workdir.value, dry_run=dry_run.value) as folder:
            run(make_config, folder, names.value, seeds=seeds.value, dry_run=dry_run.value)

    device_command.run(make_runs, __doc__, config=config)


if __name__ == "__main__":
    main()
