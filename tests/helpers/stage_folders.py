"""Folders of stages, made up: the files that a run leaves there."""

import json

from dpo_jax import config as configs
from dpo_jax import config_files


def write_stage(workdir, folder, stage, choice="toy", *, fields=(), rows=(), done=None):
    """Write the files of a stage as a run leaves them."""
    config = config_files.load(choice)
    config_files.override(config, dict(fields))
    path = workdir / folder
    path.mkdir(parents=True)
    depends_on = configs.dependencies(config, stage)
    started = dict(stage=stage, depends_on=depends_on, config=json.loads(config.to_json()))
    (path / "config.json").write_text(json.dumps(started))
    if rows:
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done is not None:
        finished = done | dict(finished="2026-01-02 03:04:05")
        (path / "done.json").write_text(json.dumps(finished))
    return path
