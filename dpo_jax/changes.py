"""Which changes of its config a stage takes that was started before, and why it refuses others.

Fields that change nothing but rounding (`config.FREE`), and the mesh, are not compared at all. Of
the others a stage takes

- a path that leads to equal contents;
- another end of training, steps or epochs, under a learning rate that does not depend on it;
- what the user names in --allow_change, while the stage is not done.

A path that is the same, and leads to other contents, is refused where the stage goes on.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from dpo_jax import config_files, loss_table, stage_table

PATHS = (
    *("model.path", "model.tokenizer", "data.path", "data.sft_path", "data.mix"),
    *("reward.path", "dpo.reference", "kto.reference", "pairs.judge.template"),
)
END = ("steps", "epochs")  # fields of a training stage
# Fields of a training stage that a resumed run can go on with, as --allow_change names them. Others
# would change the order of the data, the optimiser's state, or what the checkpoints are rated by.
ALLOWED = (
    *("lr", "schedule", "warmup_steps", "max_grad_norm", "weight_decay", "steps", "epochs"),
    *("eval_every", "loss", "divergence", *loss_table.numbers(), "weighting", "ld_alpha", "alpha"),
    *("desirable_weight", "undesirable_weight", "router_aux_loss_coef"),
    *("target_kl", "kl_horizon", "inner_epochs", "gae_lambda", "clip", "value_clip", "value_coef"),
)
# Those by which an evaluation has other numbers for the same weights.
OF_REWARDS = ("loss", "divergence", "divergence_alpha", "ld_alpha", "beta")  # implicit ones
OF_LOSS = (
    *("loss", "divergence", *loss_table.numbers(), "weighting", "ld_alpha", "alpha"),
    *("desirable_weight", "undesirable_weight"),
)

SAME_CONTENTS = "its contents are equal"
REWRITTEN = "it does not hold what it held when the stage began"
OTHER_END = "the learning rate does not depend on it"
BY_FLAG = "by --allow_change"


@dataclasses.dataclass(frozen=True)
class Change:
    """A field that has another value than before, and why the stage takes it."""

    field: str  # dotted name
    old: object
    new: object
    reason: str

    def told(self) -> str:
        """Return it as a part of a sentence."""
        return f"config.{self.field} is {self.new!r} now, {self.old!r} before ({self.reason})"


@dataclasses.dataclass(frozen=True)
class Started:
    """A stage that was started before, as far as it matters for what may change."""

    stage: str
    fields: dict  # dotted name -> value, of what it depends on
    contents: dict[str, str]  # dotted name -> sha256 of what a path led to
    last_step: int | None  # of its checkpoints
    is_done: bool
    is_evaluated: bool = False  # there is an evaluation of the last step

    def block_value(self, name: str):
        """Return the value of a field of the stage's own block; None where there is no such."""
        return self.fields.get(f"{self.stage}.{name}")


def compare(
    started: Started, now: dict, allowed: frozenset[str], contents_of: Callable[[str, str], str]
) -> tuple[list[Change], dict[str, str]]:
    """Return the changes that a stage takes, and the fields that it refuses with the reason, or "".

    now: what the stage depends on, dotted name -> value. allowed: dotted names that the user
    allows. contents_of: (dotted name, path) -> sha256, as in contents.py.
    """
    accepted = []
    refused = {}
    differing = [
        name
        for name in sorted(started.fields.keys() | now.keys())
        if started.fields.get(name) != now.get(name) and not _is_unused(name, started.fields, now)
    ]
    ends = [name for name in differing if name in _own(started.stage, END)]
    why_not = _why_not_end(started, now, allowed) if ends else ""
    # A stage that was done trains again where its end is moved.
    trains = not started.is_done or (bool(ends) and not why_not)
    for name in differing:
        reason = ""
        if name in ends:
            found = why_not
            reason = BY_FLAG if name in allowed else OTHER_END
        elif name in PATHS:
            found = _why_not_path(started, name, now.get(name), contents_of)
            reason = SAME_CONTENTS
        elif name not in _own(started.stage, ALLOWED):
            found = "" if name not in allowed else "a stage that was started cannot change it"
        elif not trains:
            found = "the stage is done" if name in allowed else ""
        elif name in allowed:
            found = _why_not_rated(started, name)
            reason = BY_FLAG
        else:
            found = f"--allow_change={name.rpartition('.')[2]} goes on with it"
        if found or not reason:
            refused[name] = found
        else:
            accepted.append(Change(name, started.fields.get(name), now.get(name), reason))
    if trains:
        for name in _rewritten(started, now, contents_of):
            refused[name] = REWRITTEN
    return accepted, refused


def _is_unused(name: str, *configs: dict) -> bool:
    """Return whether a field is epochs where steps are given, in each of some configs."""
    block, _, last = name.rpartition(".")
    return last == "epochs" and all(fields.get(f"{block}.steps") for fields in configs)


def _why_not_rated(started: Started, name: str) -> str:
    """Return why checkpoints cannot be compared once a field has changed; "" where they can."""
    metric = started.block_value("keep_best") or ""
    if metric.startswith("loss/"):
        fields = OF_LOSS
    elif metric.startswith("rewards_"):
        fields = OF_REWARDS
    elif metric.startswith("dpo_"):
        fields = OF_LOSS
    else:
        return ""
    last = name.rpartition(".")[2]
    # Accuracies are of the rewards' signs, whatever their scale.
    if last not in fields or (last == "beta" and metric.endswith("/accuracies")):
        return ""
    return f"the best checkpoint is kept by {metric}, which is another measure then"


def _rewritten(
    started: Started, now: dict, contents_of: Callable[[str, str], str]
) -> Iterator[str]:
    """Yield the fields whose path is the same as before, and leads to other contents."""
    for name, before in started.contents.items():
        path = now.get(name)
        if not path or path != started.fields.get(name):
            continue
        # The ledger of a stage that trains has the sha256 of the tokens that it reads.
        if name.startswith("data.") and stage_table.STAGES[started.stage].trains:
            continue
        held = contents_of(name, path)
        # Where the path is gone, what reads it says so.
        if held and held != before:
            yield name


def _own(stage: str, names: tuple[str, ...]) -> list[str]:
    return [f"{stage}.{name}" for name in names]


def _why_not_path(started: Started, name: str, path, contents_of) -> str:
    """Return why a stage does not take another path; "" where it leads to equal contents."""
    before = started.contents.get(name, "")
    if not before or not path:
        return "what the first one held is not known"
    held = contents_of(name, path)
    if not held:
        return "what the new one holds is not known"
    return "" if held == before else "they do not hold the same"


def _why_not_end(started: Started, now: dict, allowed: frozenset[str]) -> str:
    """Return why a stage does not take another end of training; "" where it does."""
    stage = started.stage
    old_steps, old_epochs = (started.block_value(name) for name in END)
    steps, epochs = (now.get(f"{stage}.{name}") for name in END)
    done = started.last_step
    # What cannot be, whatever the user allows.
    if done is None:
        return "there is no checkpoint to go on from"
    if steps and steps < done:
        return f"{done} steps are done"
    if not steps and (old_steps or epochs < old_epochs):
        return f"give the new end in {stage}.steps, {done} or more"
    if not allowed.isdisjoint(_own(stage, END)):
        return ""

    # What would differ from a run with this end from its start.
    way_out = f"--allow_change={'steps' if steps != old_steps else 'epochs'} goes on all the same"
    for schedule in (started.block_value("schedule"), now.get(f"{stage}.schedule")):
        if schedule != "constant":
            return (
                f"the {schedule} schedule falls to 0 at the end, so the {done} steps that are done "
                f"would have had other learning rates; {way_out}"
            )
    is_evaluated = started.is_done or started.is_evaluated
    # A run that ends there evaluates it too.
    is_compared = bool(started.block_value("keep_best")) and is_evaluated and done != steps
    if is_compared and done % started.block_value("eval_every"):
        return (
            f"the best checkpoint may be that of the old end, step {done}, where a run to the new "
            f"end has no evaluation; {way_out}"
        )
    return ""


def moves_end(stage: str, changes: list[Change]) -> bool:
    """Return whether changes give a stage another end of training."""
    return any(change.field in _own(stage, END) for change in changes)


def allowed_fields(names: str, config: ConfigDict) -> frozenset[str]:
    """Return the dotted names of the fields that --allow_change names.

    names: separated by commas, each FIELD, of whichever stage is resumed, or STAGE.FIELD. Raises
    ValueError for one that is no field of a stage that trains, or that no resumed run can take.
    """
    stages = stage_table.training_stages(config)
    found = set()
    for name in filter(None, map(str.strip, names.split(","))):
        field = name.removeprefix("config.")
        block, _, last = field.rpartition(".")
        in_stages = [block] if block else stages
        fields = [field, *(f"{stage}.{last}" for stage in in_stages)]
        known = [field for field in fields if config_files.has_field(config, field)]
        if not known:
            raise ValueError(f"--allow_change={name}: {_no_field(field, config)}")
        if last not in ALLOWED or not set(in_stages) <= set(stages):
            taken = [other for other in ALLOWED if any(other in config[stage] for stage in stages)]
            raise ValueError(
                f"--allow_change={name}: a run that is resumed cannot take another value of it. "
                f"Expected fields of a stage that trains ({', '.join(stages) or 'none here'}), of "
                f"{', '.join(taken)}. Give another --workdir or --config.run for a run of its own."
            )
        found.update(known)
    return frozenset(found)


def _no_field(name: str, config: ConfigDict) -> str:
    said = config_files.unknown_field(config, name)
    return said.partition(": ")[2] or said


def rows(changes: list[Change], step: int | None, date: str) -> list[dict]:
    """Return what config.json keeps of changes, oldest first.

    step: the last checkpoint's, from which the stage goes on.
    """
    kept = []
    for change in changes:
        row = dict(date=date, step=step) | dataclasses.asdict(change)
        kept.append(json.loads(json.dumps(row)))
    return kept
