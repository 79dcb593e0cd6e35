"""The prompts that win rates are found on: held out, and trained on by no stage of the runs.

config.data.on_leak says what to do about others, as for the stages of a run. The data sets are read
before anything is trained, since training may take hours, and a judge costs money.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from dpo_jax.console import warn
from dpo_jax.data import leaks
from dpo_jax.data.leaks import Hashes

JUDGED = "are to be judged"  # in a message: the prompts that ...


def task(make_task: Callable, runs: dict, options):
    """Return the task that make_task makes, with prompts that may be judged.

    make_task, runs, options: as for `winrate.run`. Raises ValueError where a prompt is trained on
    by a stage of the runs, unless config.data.on_leak says otherwise, or where too few are left.
    """
    made = make_task(runs, options)
    seen = leaks.read_runs(run.config for run in runs.values())
    on_leak = runs["dpo"].config.data.on_leak
    if on_leak == "drop":
        kept = _not_trained_on(made.examples, seen)
        while len(kept) < options.prompts:
            # More prompts include those before.
            count = len(made.examples) + options.prompts - len(kept)
            try:
                made = make_task(runs, dataclasses.replace(options, prompts=count))
            except ValueError as error:
                raise ValueError(
                    f"{error} {count - options.prompts:,} of them would take the place of prompts "
                    "that are trained on, as config.data.on_leak=drop leaves these out."
                ) from None
            kept = _not_trained_on(made.examples, seen)
        made = dataclasses.replace(made, examples=kept[: options.prompts])

    prompts = Hashes.of(made.examples)
    texts = [leaks.plain(example.prompt) for example in made.examples]
    refusal = leaks.refusal(JUDGED, prompts, texts, seen)
    if refusal and on_leak == "error":
        raise ValueError(refusal)
    leak = leaks.leak("", prompts, seen)
    if leak.selected_on:
        warn(leak.selection())
    if refusal:
        warn(
            f"{leak.normalised:,} of the {leak.prompts:,} prompts that are judged are trained on "
            f"({leak.told()}), as config.data.on_leak=allow takes them."
        )
    return made


def _not_trained_on(examples: list, seen: list) -> list:
    is_trained = leaks.trained(Hashes.of(examples), seen)
    return [examples[index] for index in np.flatnonzero(~is_trained)]
