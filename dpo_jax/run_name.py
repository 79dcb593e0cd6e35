"""Names of runs: a folder of its own for each setting of the last training stage."""

import re
from collections.abc import Container

from ml_collections import ConfigDict

from dpo_jax import config as configs
from dpo_jax import stage_table

# Fields of a training stage that are not in a run's name: how long and in which pieces it trains,
# and how often it looks. A run that changes one of them alone has the name that it had before, and
# `workdir.start_stage` refuses to mix the two where that matters.
UNNAMED = ("steps", "epochs", "eval_every")
LONGEST_VALUE = 60  # characters of a value in a name; the end of a path tells more than its start


def name_run(
    config: ConfigDict, base: ConfigDict, swept: Container[str] = (), unnamed: Container[str] = ()
) -> None:
    """Set config.run to a name for what the last training stage changes, such as dpo-beta0.5.

    base: the config file's own config, without overrides. Fields of other blocks are not part of
    the name: `workdir.start_stage` refuses a WORKDIR whose earlier stages differ. The name is left
    as it is where one is given, or where no field that is part of it has changed.

    swept: the fields of the last training stage (dotted names) that a sweep varies. They are always
    part of the name, and a name that is given becomes the first part of each run's.

    unnamed: fields (dotted names) that are left out of the name, as the run that goes on under it
    had other values of them.
    """
    trained = stage_table.training_stages(config)
    if not trained or (config.run and not swept):
        return
    stage = trained[-1]
    if stage not in base:
        return
    named = {}
    # A config's own order of fields, whatever the order of the overrides.
    for name in configs.STAGE_FIELDS[stage]:
        field = f"{stage}.{name}"
        value = config[stage][name]
        is_part = field in swept or (is_named(field) and field not in unnamed)
        if value != base[stage][name] and is_part:
            named[field] = value
    if named:
        config.run = name_of(config.run or stage, named)


def name_of(stem: str, fields: dict) -> str:
    """Return a run's name, as dpo-beta0.5-lr1e-05: the stem, then each dotted field's value."""
    parts = [stem]
    for field, value in fields.items():
        parts.append(field.rpartition(".")[2] + _text(value))
    return "-".join(parts)


def folder_of(fields: dict) -> str:
    """Return the name of a folder for values of some dotted fields, as pairs.prompts100."""
    return "-".join(field + _text(value) for field, value in fields.items())


def is_named(field: str) -> bool:
    """Return whether a field (dotted name) of a training stage is part of its run's name."""
    return field.rpartition(".")[2] not in UNNAMED and not configs.is_free(field)


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
