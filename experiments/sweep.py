"""One run at several values of a field: python -m experiments.sweep --config=FILE --workdir=DIR
--sweep=FIELD=V1,V2,...

    python -m experiments.sweep --config=configs/imdb.py --workdir=runs/imdb
    --sweep=dpo.beta=0.05,0.1,1,5

Every point is an ordinary run of dpo_jax.train in DIR, named FIELD_VALUE: finished ones are
skipped, an interrupted one goes on. All share the stages before, the compiled step, and (of dpo)
the reference's log-probs, computed once and kept in DIR/reference. Other fields are set as ever,
--config.FIELD=VALUE. Comes out: a table, and DIR/sweep_FIELD.png.
"""

import pathlib

from experiments.commands import parsed


def points(config, text: str) -> list[tuple[object, object]]:
    """(value, config of its run) for each value of FIELD=V1,V2,...; ValueError where it is not a
    sweep of one stage.
    """
    from dpo_jax import config as configs
    from dpo_jax import config_checks

    field, _, values = text.partition("=")
    stage, _, name = field.rpartition(".")
    last = [stage for stage in config.stages if stage in configs.TRAINING_STAGES][-1:]
    if [stage] != last or name not in config[stage] or not values:
        raise ValueError(
            f"--sweep={text}: expected FIELD=V1,V2,... with a field of the last training stage, such as "
            f"{last[0] if last else 'dpo'}.lr=1e-6,1e-5."
        )
    found = []
    for value in map(parsed, values.split(",")):
        point = config.copy_and_resolve_references()
        point[stage][name] = value
        point.run = "_".join(filter(None, [config.run, name, str(value)]))
        if stage == "dpo" and point.dpo.reference != "none":
            point.dpo.cache_reference = True
        config_checks.validate(point)
        found.append((value, point))
    return found


def table(field: str, runs: dict[str, list[dict]]) -> str:
    """What the last evaluation of each run measured."""
    ends = {label: [row for row in rows if _evaluated(row)][-1] for label, rows in runs.items()}
    names = [name for name in next(iter(ends.values())) if _evaluated([name])]
    lines = [f"{field:<16}{'step':>7}" + "".join(f"{name:>26}" for name in names)]
    for label, row in ends.items():
        lines.append(
            f"{label:<16}{row['step']:>7}" + "".join(f"{row[name]:>26.4g}" for name in names)
        )
    return "\n".join(lines)


def _evaluated(names) -> bool:
    return any("eval" in name or name.startswith("frontier/") for name in names)


def run(config, workdir: str, text: str) -> dict[str, list[dict]]:
    """Runs the points that are not done; returns value -> rows of its metrics."""
    from dpo_jax import config as configs
    from dpo_jax.console import say
    from dpo_jax.evaluation import plots
    from dpo_jax.pipeline.stages import run_stages
    from dpo_jax.training.metrics import read_rows

    field, runs = text.partition("=")[0], {}
    for value, point in points(config, text):
        say(f"--- {field} = {value}")
        run_stages(point, workdir)
        folder = pathlib.Path(workdir) / configs.folder_names(point)[field.partition(".")[0]]
        runs[str(value)] = read_rows(folder / "metrics.jsonl")
    picture = pathlib.Path(workdir) / f"sweep_{field}.png"
    plots.curves(picture, runs, field)
    say(table(field, runs))
    say(str(picture))
    return runs


def main():
    from absl import flags
    from ml_collections import config_flags

    from dpo_jax.parallel import processes

    config = config_flags.DEFINE_config_file("config", None, "The config file; see configs/.")
    workdir = flags.DEFINE_string("workdir", None, "Where the runs' folders are.")
    sweep = flags.DEFINE_string(
        "sweep", None, "FIELD=V1,V2,...: a field of the last training stage, and its values."
    )
    flags.mark_flags_as_required(["config", "workdir", "sweep"])
    processes.run(lambda _: run(config.value, workdir.value, sweep.value))


if __name__ == "__main__":
    main()
