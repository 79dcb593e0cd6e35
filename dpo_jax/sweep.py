"""Sweep fields and seeds: dpo-jax sweep --config=NAME [--workdir=WORKDIR] --sweep=FIELD=V1,V2,...

    dpo-jax sweep --config=imdb --sweep=dpo.beta=0.05,0.1,1,5
    dpo-jax sweep --config=imdb --sweep=dpo.beta=0.1,1 --seeds=3
    dpo-jax sweep --config=toy --sweep=pairs.prompts=1000,10000

Makes one run for each value, or for each combination where several fields are swept. Any field can
be, but for stages and run. Values of the last training stage are runs in WORKDIR, each named as
`dpo-jax train` names it with this value (dpo-beta0.05; dpo, at the config's own value). A value of
another field has a folder of its own, WORKDIR/pairs.prompts1000, with its own stages from the first
that depends on it; those before, training too, are shared by a link. Finished runs are skipped, and
an interrupted one continues. Runs share the compiled step, and for dpo the reference's log-probs,
which are computed once and kept in WORKDIR/reference (not where dpo.ld_alpha is below 1). A run
that diverges is left out of the results, and the others are made. Other fields are set as usual,
--config.FIELD=VALUE.

--seeds=3 makes every run with three seeds of the last training stage; it is short for
--sweep=dpo.seed=0,1,2, where the config's own seed is 0. One seed (seed, dpo.seed, pairs.seed, ...)
can be swept, and is averaged over: the result is a table with mean and 95 % interval over seeds,
WORKDIR/sweep_FIELD.csv, .md and .tex, and the curves in sweep_FIELD.png and .pdf. Seeds that
diverge are not in the mean; the column seeds counts the others. The table has what training
measured; a seed that training does not read, such as evaluate.seed, makes no other run of it.
WORKDIR/report.html has all there is to see of all runs; a folder such as pairs.prompts1000 has a
page of its own.

Values that have commas of their own, as mixtures of losses do, are separated by semicolons:

    dpo-jax sweep --config=imdb --sweep="dpo.loss=sigmoid;sigmoid=1,nll=0.2;sigmoid=1,nll=1"
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from dpo_jax import command_line, config_checks, config_files, device_command, report, stage_table
from dpo_jax import config as configs
from dpo_jax.console import SHOWN, say
from dpo_jax.evaluation import plots, statistics, tables
from dpo_jax.parallel import processes
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.run_name import folder_of, name_run
from dpo_jax.storage import shadow
from dpo_jax.training.loop import Diverged
from dpo_jax.training.metric_names import is_evaluation, is_share
from dpo_jax.training.metrics import read_rows
from dpo_jax.workdir import open_workdir

NOT_SWEPT = ("stages", "run")  # they say what a run is, and how it is called


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    values: dict[str, str]  # swept field -> its value, as it was given
    config: ConfigDict
    folder: str = ""  # the folder in WORKDIR that is the run's own WORKDIR; "": WORKDIR itself

    @property
    def shown(self) -> str:
        """The values as a person reads them."""
        return ", ".join(f"{field} = {value}" for field, value in self.values.items())

    @property
    def group(self) -> tuple[tuple[str, str], ...]:
        """What is equal in runs that differ in seeds alone."""
        return tuple(item for item in self.values.items() if not is_seed(item[0]))


def is_seed(field: str) -> bool:
    """Return whether a field (dotted name) is a seed."""
    return field.rpartition(".")[2] == "seed"


def with_seeds(config: ConfigDict, sweeps: Sequence[str], seeds: int) -> list[str]:
    """Return what is swept, and after it as many seeds of the last training stage as are asked for.

    They count from the config's own. Raises ValueError where nothing is swept.
    """
    if seeds > 1:
        trained = stage_table.training_stages(config)
        # A config that trains nothing is refused by `points`.
        field = f"{trained[-1]}.seed" if trained else "seed"
        first = config_files.value_of(config, field)
        numbers = ",".join(str(first + number) for number in range(seeds))
        return [*sweeps, f"{field}={numbers}"]
    if not sweeps:
        raise ValueError(
            "nothing is swept: give --sweep=FIELD=V1,V2,..., such as --sweep=dpo.beta=0.1,1, or "
            "--seeds=N with N from 2 on."
        )
    return list(sweeps)


def points(
    config: ConfigDict, sweeps: Sequence[str], base: ConfigDict | None = None
) -> list[Point]:
    """Return the runs of a sweep, in the order of the values, the last field varying fastest.

    sweeps: FIELD=V1,V2,... for each field. Values are separated by semicolons instead where there
    is one. base: the config file's own, without overrides: runs are named after what they change of
    it. Raises ValueError if the config, a field or a value is wrong.
    """
    config_checks.validate(config)
    trained = stage_table.training_stages(config)
    if not trained:
        raise ValueError(f"--sweep={sweeps[0]}: this config trains nothing that could be swept.")
    last = trained[-1]
    values = {}
    for sweep in sweeps:
        field, of_field = _values_of(config, sweep, last)
        if field in values:
            raise ValueError(
                f"--sweep={sweep}: {field} is swept twice. Give all of its values at once."
            )
        _check_values(config, sweep, field, of_field)
        seeds = [before for before in values if is_seed(before)]
        if is_seed(field) and seeds:
            # Runs with one of the seeds in common are alike, so they do not count as so many.
            raise ValueError(
                f"--sweep={sweep}: {seeds[0]} is swept too, and a table takes all of its runs for "
                "independent. Sweep one seed; seed itself changes all that a run draws."
            )
        values[field] = of_field
    found = []
    for combination in itertools.product(*values.values()):
        of_point = dict(zip(values, combination, strict=True))
        point = config.copy_and_resolve_references()
        config_files.override(point, of_point)
        own = [field for field in of_point if field.rpartition(".")[0] == last]
        others = {}
        for field in of_point:
            now = config_files.value_of(point, field)
            if field not in own and now != config_files.value_of(config, field):
                others[field] = now
        name_run(point, base or config, swept=own)
        if stage_table.can_keep_reference(point, last):
            point[last].cache_reference = True
        config_checks.validate(point)
        found.append(Point(of_point, point, folder_of(others)))
    return found


def _values_of(config: ConfigDict, sweep: str, last: str) -> tuple[str, list[str]]:
    """Return the field of a --sweep, and its values; ValueError where it is none."""
    field, _, values = sweep.partition("=")
    expected = f"expected FIELD=V1,V2,... with a field of the config, such as {last}.lr=1e-6,1e-5."
    if field in NOT_SWEPT:
        raise ValueError(f"--sweep={sweep}: {field} cannot be swept; {expected}")
    if not config_files.has_field(config, field):
        why = config_files.unknown_field(config, field).partition(": ")[2]
        raise ValueError(f"--sweep={sweep}: {expected} {why}")
    if not values.strip(";,"):
        raise ValueError(f"--sweep={sweep}: {expected}")
    if field == f"{last}.loss" and "=" in values and ";" not in values:
        # By its commas a mixture would fall into its losses, each a run of its own.
        raise ValueError(
            f"--sweep={sweep}: mixtures of losses have commas of their own: expected a semicolon "
            f"after each value, as in --sweep='{field}=sigmoid;sigmoid=1,nll=0.2'."
        )
    return field, values.strip(";").split(";" if ";" in values else ",")


def _check_values(config: ConfigDict, sweep: str, field: str, texts: list[str]) -> None:
    """Raise ValueError where two texts are one value: a run would count twice."""
    found = []
    for text in texts:
        point = config.copy_and_resolve_references()
        config_files.override(point, {field: text})
        value = config_files.value_of(point, field)
        if value in found:
            first = texts[found.index(value)]
            raise ValueError(
                f"--sweep={sweep}: {first} and {text} are the same value of {field}. Give it once."
            )
        found.append(value)


def share_stages(workdir: pathlib.Path, config: ConfigDict, swept: list[Point]) -> None:
    """Link the stages up to the last training stage that runs in several folders have in common.

    A stage is the same where all that it depends on is. It is made in WORKDIR if it is that of the
    config itself, or else in the folder of the first run that needs it. Nothing that is there is
    touched. In a bucket, which has no links, each folder has stages of its own.
    """
    if shadow.is_copy(workdir):
        return
    makers = {}
    for of_config, folder in ((config, ""), *((point.config, point.folder) for point in swept)):
        for number in range(1, of_config.rounds + 1):
            of_round = configs.of_round(of_config, number)
            names = configs.folder_names(of_round)
            last = stage_table.training_stages(of_round)[-1]
            for stage in of_round.stages[: of_round.stages.index(last) + 1]:
                name = names[stage]
                maker = makers.setdefault((name, _all_of(of_round, stage)), folder)
                if maker != folder:
                    _link(workdir / folder / name, workdir / maker / name)
        if folder:
            # Kept log-probs are found by what they depend on, so all runs can share them.
            _link(workdir / folder / "reference", workdir / "reference")


def _all_of(config: ConfigDict, stage: str) -> str:
    """Return all that the result of a stage depends on, as text."""
    return json.dumps(configs.dependencies(config, stage), sort_keys=True)


def attempt(
    config: ConfigDict, workdir: str | os.PathLike, errors: dict[tuple[str, str], str]
) -> None:
    """Run the stages of a config, unless one of them has diverged in another run.

    errors: what was said as stages diverged, by their names and all that they depend on in the last
    round; takes that of this run. Raises Diverged, at once for a stage in errors.
    """
    last_round = configs.of_round(config, config.rounds)
    for stage in stage_table.training_stages(last_round):
        reason = errors.get((stage, _all_of(last_round, stage)))
        if reason:
            raise Diverged(stage, reason)
    try:
        run_stages(config, workdir)
    except Diverged as error:
        # Not the error itself, whose traceback would keep the weights.
        errors[error.stage, _all_of(last_round, error.stage)] = str(error)
        raise


def trained_once(runs: list[tuple[Point, list[dict]]]) -> list[tuple[Point, list[dict]]]:
    """Return the runs, but one alone of those that differ in seeds which training does not read.

    Such a seed, as that of evaluate, says nothing of how training varies.
    """
    found = {}
    for point, rows in runs:
        last = stage_table.training_stages(point.config)[-1]
        found.setdefault((point.group, _all_of(point.config, last)), (point, rows))
    return list(found.values())


def _link(link: pathlib.Path, target: pathlib.Path) -> None:
    """Make a relative link to a folder, unless something has its name already."""
    if link.exists() or link.is_symlink():
        return
    target.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(target, link.parent))


def summaries(runs: list[tuple[Point, list[dict]]]) -> list[dict]:
    """Return the last evaluation of each run, as mean and interval over the seeds of a sweep.

    Each row has the swept fields that are no seeds, seeds (their number), and for each metric that
    training shows NAME, NAME_low and NAME_high. step and last_step are the first and the last step
    at which a seed ended, and steps both as text.
    """
    grouped = {}
    for point, rows in runs:
        evaluations = [row for row in rows if any(map(is_evaluation, row))]
        if evaluations:
            grouped.setdefault(point.group, []).append(evaluations[-1])
    found = []
    for group, last in grouped.items():
        ends = [row["step"] for row in last]
        steps = f"{min(ends)} to {max(ends)}" if min(ends) < max(ends) else str(ends[0])
        summary = dict(group) | dict(seeds=len(last))
        summary |= dict(step=min(ends), last_step=max(ends), steps=steps)
        for name in SHOWN:
            if is_evaluation(name) and all(name in row for row in last):
                values = [row[name] for row in last]
                of_seeds = statistics.mean_interval(values, is_share=is_share(name))
                summary[name] = of_seeds["mean"]
                summary[f"{name}_low"], summary[f"{name}_high"] = of_seeds["low"], of_seeds["high"]
        found.append(summary)
    return found


def columns(rows: list[dict], fields: Sequence[str]) -> list[tables.Column]:
    """Return the columns of a table of `summaries`; fields: those that were swept."""
    found = [tables.Column(field, field) for field in fields if not is_seed(field)]
    if any(map(is_seed, fields)):
        found.append(tables.Column("seeds", "seeds", "d"))
    # With patience, seeds end at steps of their own.
    if any(row["step"] != row["last_step"] for row in rows):
        found.append(tables.Column("steps", "steps"))
    else:
        found.append(tables.Column("step", "step", "d"))
    for name in SHOWN:
        if name in rows[0]:
            ends = (f"{name}_low", f"{name}_high")
            found.append(tables.Column(SHOWN[name], name, ".4g", interval=ends))
    return found


def table(rows: list[dict], shown: list[tables.Column]) -> str:
    """Return `summaries` as a table for a terminal."""
    cells = [[column.title for column in shown]]
    for row in rows:
        cells.append([column.shown(row) for column in shown])
    widths = [max(map(len, of_column)) for of_column in zip(*cells, strict=True)]
    lines = []
    for of_row in cells:
        parts = []
        for column, cell, width in zip(shown, of_row, widths, strict=True):
            parts.append(f"{cell:>{width}}" if column.number_format else f"{cell:<{width}}")
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def run(
    config: ConfigDict, workdir: str, sweeps: Sequence[str], base: ConfigDict | None = None
) -> list[tuple[Point, list[dict]]]:
    """Make the runs that are not done; return each with the rows of its metrics.

    One that diverges is told of and left out, and the others are still made. A stage that diverged
    is not tried again for other runs that share it. Raises Diverged if all runs do.
    """
    swept = points(config, sweeps, base)
    last = stage_table.training_stages(config)[-1]
    fields = list(swept[0].values)
    runs = []
    diverged = []
    errors = {}
    workdirs = [os.path.join(workdir, point.folder) if point.folder else workdir for point in swept]
    with contextlib.ExitStack() as ends:
        # That of WORKDIR, which has all of them, is written last.
        for of_runs in dict.fromkeys([workdir, *workdirs]):
            ends.enter_context(report.at_end(of_runs))
        folder = ends.enter_context(open_workdir(workdir))
        processes.from_first(functools.partial(share_stages, folder, config, swept))
        for point in swept:
            say(f"--- {point.shown}")
            try:
                attempt(point.config, folder / point.folder, errors)
            except Diverged as error:
                diverged.append(point.shown)
                if len(diverged) == len(swept):
                    raise
                say(str(error))
                continue
            trained = folder / point.folder / configs.folder_names(point.config)[last]
            runs.append((point, read_rows(trained / "metrics.jsonl")))
        different = trained_once(runs)
        found = summaries(different)
        picture = folder / f"sweep_{'-'.join(fields)}.png"
        if found:
            shown = columns(found, fields)
            processes.from_first(functools.partial(tables.write, picture, found, shown))
            say(table(found, shown))
        else:
            say("No run was evaluated while it trained, so there is no table.")
        in_rows = set()
        for _, rows in different:
            in_rows.update(*rows)
        if in_rows & plots.CURVES.keys():
            _draw(picture, different, fields)
            say(str(picture))
        for shown_point in diverged:
            say(f"{shown_point} diverged, and is left out. See what was said of it above.")
    return runs


def _draw(picture: pathlib.Path, runs: list[tuple[Point, list[dict]]], fields: list[str]) -> None:
    """Draw the curves of all runs, those of seeds as one."""
    by_label = {}
    for point, rows in runs:
        label = ", ".join(value for _, value in point.group)
        by_label.setdefault(label or "mean over seeds", []).append(rows)
    names = [field for field in fields if not is_seed(field)]
    plots.curves(picture, by_label, ", ".join(names))


def main():
    config = command_line.define_config()
    workdir = command_line.define_workdir()
    sweeps = flags.DEFINE_multi_string(
        "sweep", [], "FIELD=V1,V2,...: a field and its values. Several make all combinations."
    )
    seeds = flags.DEFINE_integer(
        "seeds", 1, "Number of seeds of the last training stage.", lower_bound=1
    )

    def sweep_fields():
        swept = config.load()
        fields = with_seeds(swept, sweeps.value, seeds.value)
        folder = workdir.value or config.default_workdir()
        say(f"WORKDIR is {folder}")
        run(swept, folder, fields, base=config_files.load(config.choice))

    device_command.run(sweep_fields, __doc__, config=config)


if __name__ == "__main__":
    main()
