"""Sweep a field: dpo-jax sweep --config=NAME [--workdir=WORKDIR] --sweep=FIELD=V1,V2,...

    dpo-jax sweep --config=imdb --sweep=dpo.beta=0.05,0.1,1,5

Makes one run for each value, all in WORKDIR, each named as `dpo-jax train` names it with this value
(dpo-beta0.05; dpo, at the config's own value). Finished runs are skipped, and an interrupted one
continues. The runs share the stages before the last training stage, the compiled step, and for dpo
the reference's log-probs, which are computed once and kept in WORKDIR/reference (not where
dpo.ld_alpha is below 1). Other fields are set as usual, --config.FIELD=VALUE. The result is a
table, and the curves in WORKDIR/sweep_FIELD.png; WORKDIR/report.html has all there is to see of the
runs.

Values that have commas of their own, as mixtures of losses do, are separated by semicolons:

    dpo-jax sweep --config=imdb --sweep="dpo.loss=sigmoid;sigmoid=1,nll=0.2;sigmoid=1,nll=1"
"""

from absl import flags
from ml_collections import ConfigDict

from dpo_jax import command_line, config_checks, config_files, device_command, report, stage_table
from dpo_jax import config as configs
from dpo_jax.console import SHOWN, say
from dpo_jax.evaluation import plots
from dpo_jax.pipeline.stages import run_stages
from dpo_jax.run_name import name_run
from dpo_jax.training.metric_names import is_evaluation
from dpo_jax.training.metrics import read_rows
from dpo_jax.workdir import open_workdir


def points(
    config: ConfigDict, sweep: str, base: ConfigDict | None = None
) -> list[tuple[str, ConfigDict]]:
    """Return (value as it was given, config of its run) for each value of FIELD=V1,V2,...

    Values are separated by semicolons instead where there is one. base: the config file's own,
    without overrides: runs are named after what they change of it. Raises ValueError if the config
    or a value is wrong, or FIELD is no field of the config's last training stage.
    """
    config_checks.validate(config)
    field, _, values = sweep.partition("=")
    stage, _, name = field.rpartition(".")
    trained = stage_table.training_stages(config)
    if not trained:
        raise ValueError(f"--sweep={sweep}: this config trains nothing that could be swept.")
    last = trained[-1]
    if stage != last or name not in config[last] or not values:
        raise ValueError(
            f"--sweep={sweep}: expected FIELD=V1,V2,... with a field of the last training stage, "
            f"such as {last}.lr=1e-6,1e-5. The fields of {last} are {', '.join(config[last])}."
        )
    if name == "loss" and "=" in values and ";" not in values:
        # By its commas a mixture would fall into its losses, each a run of its own.
        raise ValueError(
            f"--sweep={sweep}: mixtures of losses have commas of their own: expected a semicolon "
            f"after each value, as in --sweep='{field}=sigmoid;sigmoid=1,nll=0.2'."
        )
    found = []
    for value in values.strip(";").split(";" if ";" in values else ","):
        point = config.copy_and_resolve_references()
        config_files.override(point, {field: value})
        name_run(point, base or config, swept=field)
        if stage_table.can_keep_reference(point, stage):
            point[stage].cache_reference = True
        config_checks.validate(point)
        found.append((value, point))
    return found


def table(field: str, runs: dict[str, list[dict]]) -> str:
    """Return a table of the last evaluation of each run, with the metrics that training shows."""
    last_evaluations = {}
    for value, rows in runs.items():
        evaluations = [row for row in rows if any(map(is_evaluation, row))]
        last_evaluations[value] = evaluations[-1]
    first = next(iter(last_evaluations.values()))
    names = [name for name in SHOWN if name in first and is_evaluation(name)]
    widths = {name: max(len(SHOWN[name]), 8) + 2 for name in names}
    heads = "".join(f"{SHOWN[name]:>{widths[name]}}" for name in names)
    lines = [f"{field:<16}{'step':>7}{heads}"]
    for value, row in last_evaluations.items():
        cells = "".join(f"{row[name]:>{widths[name]}.4g}" for name in names)
        lines.append(f"{value:<16}{row['step']:>7}{cells}")
    return "\n".join(lines)


def run(
    config: ConfigDict, workdir: str, sweep: str, base: ConfigDict | None = None
) -> dict[str, list[dict]]:
    """Make the runs that are not done; return the rows of metrics of each value's run."""
    field = sweep.partition("=")[0]
    stage = field.partition(".")[0]
    runs = {}
    swept = points(config, sweep, base)
    with report.at_end(workdir), open_workdir(workdir) as folder:
        for value, point in swept:
            say(f"--- {field} = {value}")
            run_stages(point, folder)
            rows = folder / configs.folder_names(point)[stage] / "metrics.jsonl"
            runs[value] = read_rows(rows)
        picture = folder / f"sweep_{field}.png"
        plots.curves(picture, runs, field)
    say(table(field, runs))
    say(str(picture))
    return runs


def main():
    config = command_line.define_config()
    workdir = command_line.define_workdir()
    sweep = flags.DEFINE_string(
        "sweep", None, "FIELD=V1,V2,...: a field of the last training stage, and its values."
    )
    flags.mark_flags_as_required(["sweep"])

    def sweep_field():
        swept = config.load()
        folder = workdir.value or config.default_workdir()
        say(f"WORKDIR is {folder}")
        run(swept, folder, sweep.value, base=config_files.load(config.choice))

    device_command.run(sweep_field, __doc__, config=config)


if __name__ == "__main__":
    main()
