"""Held-out prompts of a run that its stages train on: reported by each stage, refused where judged.

A stage that reads data writes the hashes of its prompts to its folder (see data/leaks.py), and is
compared with the stages of the run before it. Models that the run starts from, and other runs in
the same WORKDIR, are not looked at.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax import stage_table
from dpo_jax.console import say, warn
from dpo_jax.data import leaks
from dpo_jax.data.leaks import Hashes, Seen
from dpo_jax.parallel import processes
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.stage_table import STAGES
from dpo_jax.workdir import read_ledger, write_record

# What a stage does with held-out prompts, in a message.
JUDGED = {"evaluate": "evaluate is to report on", "best_of_n": "best_of_n is to report on"}


def report(run, stage: str, source: str, splits: dict[str, Hashes]) -> dict:
    """Keep the prompts of a stage, show which held-out ones are trained on, and return that.

    run: a `Run`. source: where the prompts are from. splits: train, and those to evaluate on. The
    result is for the stage's ledger.
    """

    def compare() -> dict:
        folder = run.folder(stage)
        folder.mkdir(parents=True, exist_ok=True)
        # The folder of the run is another one on another machine.
        data = source.removeprefix(f"{run.workdir}/")
        leaks.write(folder, Seen(_name(run, folder), data, splits))
        seen, unknown = _seen(run, stage)
        found = leaks.of_run(seen)
        return dict(told=leaks.table(found, unknown), values=leaks.to_dict(found, unknown))

    found = processes.from_first(compare)
    if found["told"]:
        say(found["told"])
    return found["values"]


@dataclasses.dataclass(frozen=True)
class Judged:
    """The held-out prompts that a stage may judge."""

    prompts: Prompts
    held_out: int  # how many there were
    kind: str = "held-out"  # of what they are, for a message

    def told(self) -> str:
        """Return how many were left out, as a sentence without its end; "" where none was."""
        left_out = self.held_out - len(self.prompts)
        if not left_out:
            return ""
        return (
            f"{left_out:,} of {self.held_out:,} {self.kind} prompts are trained on and left out "
            "(config.data.on_leak=drop)"
        )


def check_ahead(run, stage: str, tokenizer) -> None:
    """Raise ValueError where a later stage is to judge a prompt that is trained on, or lacks some.

    Training may take hours, so this comes before. stage: the one that is about to train. Data sets
    that only later stages train on are read for it.
    """
    later = functools.cache(functools.partial(_read_later, run, stage))
    for judging in stage_table.JUDGING:
        is_exact = judging == "evaluate" and run.is_measured_exactly()
        if judging in run.config.stages and not is_exact:
            run.say_of_test_prompts(judging, tokenizer)
            found = run.test_prompts(judging, tokenizer, later)
            asked = found.prompts.spread(run.config[judging].prompts)
            warn_of_selection(run, judging, asked, run.load_prompts(tokenizer), later)


def _read_later(run, stage: str) -> list[Seen]:
    """Read the prompts of the data sets that only stages after a stage train on."""
    index = run.config.stages.index(stage)
    known = set()
    found = []
    for name, (key, data) in leaks.data_sets(run.config).items():
        if run.config.stages.index(name) > index and key not in known:
            seen = leaks.read_of_stage(data, name)
            found.append(dataclasses.replace(seen, data=f"config.data: {seen.data}"))
        known.add(key)
    return found


def judged(
    run,
    stage: str,
    held_out: Prompts,
    training: Prompts,
    later: Callable[[], list[Seen]] = list,
) -> Prompts:
    """Return the held-out prompts that a stage may judge; ValueError where it is to stop.

    training: the prompts of the training split. later: returns those of data sets that only stages
    to come train on. As many are judged as the stage's block asks for.
    """
    data = run.config.data
    held_out = with_clusters(run, held_out)
    if held_out.hashes is None or data.on_leak == "allow":
        return held_out
    if data.on_leak == "drop":
        # Also those that other methods of the same data would train on, so that all judge the same.
        possible = Seen("", "", dict(train=training.hashes))

        def trained() -> np.ndarray:
            seen, _ = _seen(run, stage)
            return leaks.trained(held_out.hashes, [possible, *seen, *later()])

        is_trained = processes.from_first(trained)
        return held_out.take(np.flatnonzero(~is_trained))
    wanted = held_out.spread(run.config[stage].prompts)

    def why_not() -> str:
        seen, _ = _seen(run, stage)
        return leaks.refusal(JUDGED[stage], wanted.hashes, wanted.texts, [*seen, *later()])

    refusal = processes.from_first(why_not)
    if refusal:
        raise ValueError(refusal)
    return held_out


def warn_of_selection(
    run,
    stage: str,
    asked: Prompts,
    loaded: dict[str, Prompts],
    later: Callable[[], list[Seen]] = list,
) -> None:
    """Warn where a stage judges prompts that training is validated on, in any data set of a run.

    asked: the prompts that it judges. loaded: those of each split that they are from; where none
    are of test, another warning says so. later: as for `judged`.
    """
    if asked.hashes is None or not len(loaded["test"]):
        return

    def told() -> str:
        seen, _ = _seen(run, stage)
        return leaks.leak(stage, asked.hashes, [*seen, *later()]).selection()

    warning = processes.from_first(told)
    if warning:
        warn(f"{stage}: {warning}")


def with_clusters(run, prompts: Prompts) -> Prompts:
    """Return prompts that know which of their rows are alike: those of one prompt of the data.

    The toy has four prompts, which are all trained on, and draws that of each row anew: what is
    measured is fresh completions, and rows with one prompt are independent.
    """
    return dataclasses.replace(prompts, hashes=None) if run.config.data.source == "toy" else prompts


def record_judged(run, stage: str, whole: Judged, training: Prompts) -> None:
    """Write to a stage's ledger how many of the prompts that it judges are trained on.

    whole: what it may judge, of which it takes as many as its block asks for. training: the
    prompts of the training split, of which prefixes may be the same.
    """
    if whole.told():
        say(f"{stage}: {whole.told()}")
    asked = whole.prompts.spread(run.config[stage].prompts)
    if jax.process_index():
        return
    folder = run.folder(stage)
    found = {}
    if asked.hashes is not None:
        seen, unknown = _seen(run, stage)
        leak = leaks.leak(_name(run, folder), asked.hashes, seen)
        found = leaks.to_dict([leak], unknown)
        if leak.normalised:
            warn(
                f"{stage}: {leak.normalised:,} of {leak.prompts:,} prompts that are judged are "
                f"trained on ({leak.told()}), as config.data.on_leak=allow takes them."
            )
    found |= prefixes(run, asked, training)
    left_out = whole.held_out - len(whole.prompts)
    if left_out:
        found["left_out"] = dict(prompts=whole.held_out, trained_on=left_out)
    write_record(folder / "ledger.json", dict(prompts=len(asked), leaks=found))


def prefixes(run, held_out: Prompts, training: Prompts) -> dict:
    """Return how many held-out prefixes are training prefixes too, and say so; {} without any."""
    if not run.config.sampling.max_prefix:
        return {}
    shared = leaks.shared_prefixes(held_out.ids, training.ids)
    block = run.config.sampling
    say(
        f"{shared:,} of {len(held_out):,} held-out prefixes of {block.min_prefix} to "
        f"{block.max_prefix} tokens are training prefixes, too: so short ones often are, though "
        "the texts that they begin are others"
    )
    return dict(prefixes=dict(prompts=len(held_out), trained_on=shared))


def add_to_ledger(folder: pathlib.Path, values: dict) -> None:
    """Add leaks to the ledger of a stage that has written it. Process 0 only."""
    if jax.process_index() == 0:
        write_record(folder / "ledger.json", read_ledger(folder) | dict(leaks=values))


def _seen(run, stage: str) -> tuple[list[Seen], list[str]]:
    """Return the prompts of a stage and of those before it, and the stages that are not known."""
    seen = []
    unknown = []
    for name, folder in _folders(run, stage):
        found = _load(folder, _state(folder))
        if found is not None:
            seen.append(found)
        elif (folder / "done.json").exists():
            unknown.append(name)
    return seen, unknown


def _folders(run, last: str) -> list[tuple[str, pathlib.Path]]:
    """Return the folders of the stages that read prompts of data to train on, up to a stage."""
    found = []
    for number in range(1, run.config.rounds + 1):
        in_round = run.of_round(number)
        for stage in run.config.stages:
            if number > 1 and not stage_table.repeats(run.config, stage):
                continue
            is_after = run.config.stages.index(stage) > run.config.stages.index(last)
            if is_after and number == run.config.rounds:
                break
            is_sampled = stage_table.trains_on_samples(run.config, stage)
            if (STAGES[stage].trains or stage == "pairs") and not is_sampled:
                folder = in_round.folder(stage)
                found.append((_name(run, folder), folder))
    return found


def _name(run, folder: pathlib.Path) -> str:
    return folder.relative_to(run.workdir).as_posix()


def _state(folder: pathlib.Path) -> tuple:
    """Return what is another once the hashes in a folder are written again."""
    path = folder / leaks.FILE
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else ()


@functools.lru_cache(maxsize=16)  # a run asks for the same ones before each stage
def _load(folder: pathlib.Path, _state: tuple) -> Seen | None:
    return leaks.load(folder)
