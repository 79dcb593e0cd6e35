"""Names of runs: a folder of its own for a run that changes only its last training stage."""

import re

from ml_collections import ConfigDict

from dpo_jax import config as configs
from dpo_jax import stage_table

# Fields of a training stage that are not in a run's name: how long and in which pieces it trains,
# and how often it looks. A run that changes one of them alone has the name that it had before, and
# `workdir.start_stage` refuses to mix the two where that matters.
UNNAMED = ("steps", "epochs", "microbatch_size", "eval_every")
LONGEST_VALUE = 60  # characters of a value in a name; the end of a path tells more than its start


def name_run(config: ConfigDict, base: ConfigDict, swept: str = "") -> None:
    """Set config.run to a name for what the last training stage changes, such as dpo-beta0.5.

    base: the config file's own config, without overrides. The name is left as it is where one is
    given, where the two differ in anything else that the stage depends on (so that it cannot share
    the stages before), or where nothing of note differs.

    swept: the field of the last training stage (dotted name) that a sweep varies. A run of a sweep
    is named behind the name that is given; and after this field alone, where the two differ in
    something else.
    """
    trained = stage_table.training_stages(config)
    if not trained or (config.run and not swept):
        return
    stage = trained[-1]
    changed = _changed(config, base, stage)
    own = [field for field in changed if field.startswith(f"{stage}.")]
    if len(own) < len(changed):
        # All runs of a sweep share the rest.
        own = [swept] if swept in own else []
    named = {field: changed[field] for field in own if field == swept or is_named(field)}
    if named:
        config.run = name_of(config.run or stage, named)


def name_of(stem: str, fields: dict) -> str:
    """Return a run's name, as dpo-beta0.5-lr1e-05: the stem, then each dotted field's value."""
    parts = [stem]
    for field, value in fields.items():
        parts.append(field.rpartition(".")[2] + _text(value))
    return "-".join(parts)


def is_named(field: str) -> bool:
    """Return whether a field (dotted name) of a training stage is part of its run's name."""
    return field.rpartition(".")[2] not in UNNAMED and not configs.is_free(field)


def _changed(config: ConfigDict, base: ConfigDict, stage: str) -> dict:
    """Return the fields that the stage depends on and that differ from the base, in their order."""
    if stage not in base.stages:
        return configs.dependencies(config, stage)
    before = configs.dependencies(base, stage)
    now = configs.dependencies(config, stage)
    fields = [field for field in now if field not in before or now[field] != before[field]]
    # A config's own order of fields, whatever the order of the overrides.
    order = [field for field, _, _ in configs.field_docs()]
    fields.sort(key=lambda field: order.index(field) if field in order else len(order))
    return {field: now[field] for field in fields}


def _text(value) -> str:
    """Return a value in a form that a folder's name can have."""
    if isinstance(value, float):
        short = f"{value:g}"
        return _safe(short if float(short) == value else repr(value))
    return _safe(str(value))


def _safe(text: str) -> str:
    """Return the text in letters, digits, '.', '_' and '-'."""
    words = re.sub(r"[^\w.-]+", "-", text.replace("e+", "e"))
    return words.strip("-")[-LONGEST_VALUE:]
