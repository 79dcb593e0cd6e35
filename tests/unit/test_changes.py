"""Which changes of its config a stage takes, and why it refuses others."""

import pytest

from dpo_jax import config as configs
from dpo_jax.changes import ALLOWED, END, PATHS, Started, allowed_fields, compare
from dpo_jax.pipeline import stages
from dpo_jax.workdir import StageChanged, finish_stage, stage_status, start_stage

VERSIONS = dict(tokenization=1)
FIELDS = {"dpo.steps": 8, "dpo.epochs": 1.0, "dpo.schedule": "constant", "dpo.lr": 0.1}
FIELDS |= {"dpo.keep_best": "", "dpo.eval_every": 3, "data.path": "old", "seed": 0}


def refused(
    allowed=(),
    is_done=False,
    last_step=4,
    contents=None,
    now=None,
    is_evaluated=False,
    **changes,
):
    """Return the reason for the one change that is refused; "taken" where none is."""
    held = {"old": "a", "equal": "a", "other": "b"} if contents is None else contents
    fields = FIELDS | (now or {})
    started = Started("dpo", fields, {"data.path": "a"}, last_step, is_done, is_evaluated)
    wanted = FIELDS | (now or {}) | {f"dpo.{name}": value for name, value in changes.items()}
    wanted["data.path"] = wanted.pop("dpo.path", "old")
    wanted["seed"] = wanted.pop("dpo.seed", 0)
    _, reasons = compare(started, wanted, frozenset(allowed), lambda _, path: held.get(path, ""))
    return " | ".join(reasons.values()) if reasons else "taken"


@pytest.mark.parametrize("is_done", [False, True])
def test_compare_takes_paths_of_equal_contents(is_done):
    assert refused(path="equal", is_done=is_done) == "taken"
    assert refused(path="other", is_done=is_done) == "they do not hold the same"
    assert refused(path="hub/name", is_done=is_done) == "what the new one holds is not known"


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_compare_takes_a_moved_reference_of_equal_contents(stage):
    field = f"{stage}.reference"
    old, new = {field: "old", f"{stage}.steps": 8}, {field: "equal", f"{stage}.steps": 8}
    started = Started(stage, old, {field: "a"}, 4, is_done=False)
    accepted, reasons = compare(started, new, frozenset(), lambda _, path: {"equal": "a"}[path])
    assert reasons == {} and [change.field for change in accepted] == [field]


@pytest.mark.parametrize(("stage", "path"), [("dpo", "model.path"), ("pairs", "data.path")])
def test_compare_refuses_other_contents_at_the_same_path(stage, path):
    fields = {path: "there", f"{stage}.steps": 4, f"{stage}.epochs": 1.0, "dpo.reference": "gone"}
    fields[f"{stage}.schedule"] = "constant"
    begun_with = {path: "a", "dpo.reference": "a"}
    held = {"there": "b"}

    def compared(is_done=False, contents=begun_with, **changes):
        started = Started(stage, fields, contents, 4, is_done)
        wanted = fields | {f"{stage}.{name}": value for name, value in changes.items()}
        return compare(started, wanted, frozenset(), lambda _, path: held.get(path, ""))[1]

    assert compared() == {path: "it does not hold what it held when the stage began"}
    # A finished stage is used as it is, unless it is trained on.
    assert compared(is_done=True) == {}
    assert list(compared(is_done=True, steps=8)) == [path]
    # One that began before this was written cannot know.
    assert compared(contents={}) == {}


def test_compare_leaves_data_that_is_trained_on_to_its_ledger():
    assert refused(path="old", contents={"old": "b"}) == "taken"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(steps=9), "taken"),
        (dict(steps=4), "taken"),  # no step beyond it is done
        (dict(steps=3), "4 steps are done"),
        (dict(steps=0), "give the new end in dpo.steps, 4 or more"),
        (
            dict(steps=9, schedule="linear", allowed=["dpo.schedule"]),
            "the linear schedule falls to 0 at the end",
        ),
        (dict(steps=9, last_step=None), "there is no checkpoint to go on from"),
        (dict(steps=9, allowed=["dpo.steps"], last_step=None), "there is no checkpoint"),
        (dict(steps=3, allowed=["dpo.steps"]), "4 steps are done"),
        (dict(steps=9, now={"dpo.schedule": "cosine"}), "the cosine schedule falls to 0"),
        (dict(steps=9, now={"dpo.schedule": "cosine"}, allowed=["dpo.steps"]), "taken"),
        (dict(epochs=2.0, now={"dpo.steps": 0}), "taken"),
        (dict(epochs=0.5, now={"dpo.steps": 0}), "give the new end in dpo.steps, 4 or more"),
        (dict(steps=9, now={"dpo.keep_best": "loss/eval"}), "taken"),
        (
            dict(steps=9, now={"dpo.keep_best": "loss/eval"}, last_step=8, is_done=True),
            "the best checkpoint may be that of the old end, step 8",
        ),
        (  # by epochs, which say no step
            dict(epochs=2.0, now={"dpo.keep_best": "loss/eval", "dpo.steps": 0}, is_evaluated=True),
            "the best checkpoint may be that of the old end, step 4",
        ),
        (dict(steps=4, now={"dpo.keep_best": "loss/eval"}, is_evaluated=True), "taken"),
        (
            dict(steps=12, now={"dpo.keep_best": "loss/eval"}, last_step=9, is_done=True),
            "taken",  # a run to step 12 evaluates at step 9 as well
        ),
    ],
)
def test_compare_moves_the_end_where_no_step_would_differ(changes, reason):
    assert refused(**changes).startswith(reason)


def test_compare_takes_what_is_allowed_while_training_goes_on():
    assert refused(lr=0.2) == "--allow_change=lr goes on with it"
    assert refused(lr=0.2, allowed=["dpo.lr"]) == "taken"
    assert refused(lr=0.2, allowed=["dpo.lr"], is_done=True) == "the stage is done"
    assert refused(lr=0.2, steps=9, allowed=["dpo.lr"], is_done=True) == "taken"
    assert refused(seed=1) == ""


@pytest.mark.parametrize("field", ["beta", "desirable_weight", "undesirable_weight"])
def test_compare_takes_the_numbers_of_kto(field):
    name = f"kto.{field}"
    started = Started("kto", {name: 1.0, "kto.keep_best": ""}, {}, 4, is_done=False)
    now = {name: 2.0, "kto.keep_best": ""}
    assert compare(started, now, frozenset([name]), lambda *_: "")[1] == {}


@pytest.mark.parametrize(
    ("metric", "field", "is_taken"),
    [
        ("", "beta", True),
        ("loss/eval", "lr", True),
        ("loss/eval", "beta", False),
        ("loss/eval", "simpo_gamma", False),
        ("loss/eval", "loss", False),
        ("loss/eval", "desirable_weight", False),
        ("loss/eval", "undesirable_weight", False),
        ("rewards_eval/margins", "beta", False),
        ("rewards_eval/margins", "label_smoothing", True),
        ("rewards_eval/accuracies", "beta", True),
        ("rewards_eval/accuracies", "divergence", False),
        ("dpo_eval/gradient_weight", "beta", False),
        ("logps_eval/chosen", "beta", True),
    ],
)
def test_compare_keeps_what_the_best_checkpoint_is_kept_by(metric, field, is_taken):
    """Checkpoints that the old loss has rated would be compared with those of the new one."""
    found = refused(allowed=[f"dpo.{field}"], now={"dpo.keep_best": metric}, **{field: 0.5})
    expected = f"the best checkpoint is kept by {metric}, which is another measure then"
    assert found == ("taken" if is_taken else expected)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_compare_leaves_out_epochs_where_steps_are_given(stage):
    """Of a stage before too."""
    fields = FIELDS | {"sft.steps": 4, "sft.epochs": 1.0}
    other = fields | {f"{stage}.epochs": 2.0}
    started = Started("dpo", fields, {}, 8, is_done=True)
    assert compare(started, other, frozenset(), lambda *_: "") == ([], {})
    by_epochs = [names | {f"{stage}.steps": 0} for names in (fields, other)]
    started = Started("dpo", by_epochs[0], {}, 8, is_done=True)
    accepted, reasons = compare(started, by_epochs[1], frozenset(), lambda *_: "")
    assert [*reasons, *(change.field for change in accepted)] == [f"{stage}.epochs"]


def test_tables_name_fields():
    stages = [block for block in configs.STAGE_FIELDS.values() if "lr" in block]
    assert all(any(name in block for block in stages) for name in (*ALLOWED, *END))
    assert all(configs.field_of(name) for name in PATHS)


def test_allowed_fields_are_those_of_the_stages_that_train():
    config = configs.default(("sft", "dpo", "evaluate"))
    assert allowed_fields("", config) == frozenset()
    assert allowed_fields("lr, dpo.beta", config) == {"sft.lr", "dpo.lr", "dpo.beta"}
    assert allowed_fields("config.dpo.lr", config) == {"dpo.lr"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("dpo.ls", "--allow_change=dpo.ls: there is no such field. Did you mean dpo.loss"),
        ("rates", "--allow_change=rates: "),
        ("seed", "--allow_change=seed: a run that is resumed cannot take another value of it"),
        ("optimizer", "--allow_change=optimizer: a run that is resumed cannot"),
        ("data.path", "--allow_change=data.path: a run that is resumed cannot"),
        ("evaluate.prompts", "--allow_change=evaluate.prompts: a run that is resumed cannot"),
        ("ppo.lr", "--allow_change=ppo.lr: this config runs no stage ppo"),
    ],
)
def test_allowed_fields_refuses_others(names, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        allowed_fields(names, configs.default(("sft", "dpo", "evaluate")))


# folders of stages


def config_of(run="", **fields):
    config = configs.default(("dpo", "evaluate"))
    config.run = run
    config.dpo.update(fields)
    return config


def begin(workdir, config, stage="dpo", step=4):
    folder, _ = start_stage(workdir, config, stage, VERSIONS)
    (folder / "checkpoints" / str(step)).mkdir(parents=True)
    return folder


def test_changed_files_at_the_same_path_are_named(tmp_path):
    """A model's config.json is no part of its weights' fingerprint."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"rms_norm_eps": 1e-6}')
    config = config_of()
    config.model.path = str(model)
    begin(tmp_path / "run", config)
    assert stage_status(tmp_path / "run", config, "dpo", VERSIONS) == ("unfinished", [])
    (model / "config.json").write_text('{"rms_norm_eps": 1e-5}')
    said = f"config.model.path: '{model}' .it does not hold what it held .*\nPut the old files back"
    with pytest.raises(StageChanged, match=said):
        stage_status(tmp_path / "run", config, "dpo", VERSIONS)


def test_end_by_epochs_that_was_evaluated_cannot_move(tmp_path):
    """Killed after its last checkpoint, before it was done."""
    fields = dict(schedule="constant", keep_best="loss/eval", eval_every=3)
    folder = begin(tmp_path, config_of(epochs=1.0, **fields))
    longer = config_of(epochs=2.0, **fields)
    rows = folder / "metrics.jsonl"
    rows.write_text('{"step": 3, "loss/eval": 0.6}\n{"step": 4, "loss/train": 0.6}\n')
    assert stage_status(tmp_path, longer, "dpo", VERSIONS)[0] == "unfinished"
    rows.write_text('{"step": 4, "loss/train": 0.6, "loss/eval": 0.6}\n')
    with pytest.raises(StageChanged, match="dpo.epochs: .*the best checkpoint may be that of"):
        stage_status(tmp_path, longer, "dpo", VERSIONS)


def test_allowed_change_does_not_choose_between_runs(tmp_path, monkeypatch):
    """Neither the file's own nor one that was named by its rate is meant more than the other."""
    monkeypatch.setattr(stages, "versions", lambda: VERSIONS)
    monkeypatch.setattr(stages, "_run_all", lambda *_: None)
    monkeypatch.setattr(stages.config_checks, "validate", lambda _: None)  # it has no model
    begin(tmp_path, config_of())
    config = config_of(lr=0.2)
    allowed = dict(allowed=frozenset(["dpo.lr"]), is_named=False)
    stages.run_stages(config, str(tmp_path), **allowed)
    begin(tmp_path, config_of(run="dpo-lr0.1", lr=0.1))
    said = "can go on with this config: dpo, dpo-lr0.1. Say which one, such as --config.run=dpo-lr0"
    with pytest.raises(StageChanged, match=said):
        stages.run_stages(config, str(tmp_path), **allowed)
    stages.run_stages(config, str(tmp_path), **allowed | dict(is_named=True))
    # Without a change there is no choice.
    stages.run_stages(config_of(), str(tmp_path), **allowed)


def test_later_stage_refuses_an_end_that_has_moved(tmp_path):
    """Before the earlier one goes on: it would be trained for nothing."""
    config = config_of(steps=4)
    finish_stage(begin(tmp_path, config))
    finish_stage(begin(tmp_path, config, "evaluate"))
    longer = config_of(steps=8)
    assert stage_status(tmp_path, longer, "dpo", VERSIONS)[0] == "unfinished"
    with pytest.raises(StageChanged, match="dpo.steps: 4 in the folder, 8 now\nIt was made from"):
        stage_status(tmp_path, longer, "evaluate", VERSIONS)


def test_allowed_change_does_not_begin_a_run_of_its_own(tmp_path):
    """The run was named by the value that it began with."""
    begin(tmp_path, config_of(run="dpo-lr0.1", lr=0.1))
    with pytest.raises(StageChanged, match="dpo-lr0.1 holds a run that differs in dpo.lr alone"):
        stage_status(tmp_path, config_of(lr=0.2), "dpo", VERSIONS, frozenset(["dpo.lr"]))
    status, (change,) = stage_status(
        tmp_path, config_of("dpo-lr0.1", lr=0.2), "dpo", VERSIONS, frozenset(["dpo.lr"])
    )
    assert status == "unfinished" and (change.old, change.new) == (0.1, 0.2)
    # One that was begun with the new value need not change at all.
    with pytest.raises(StageChanged, match="dpo-lr0.1 holds the run of this config. Give"):
        stage_status(tmp_path, config_of(lr=0.1), "dpo", VERSIONS, frozenset(["dpo.lr"]))
    # One that differs in more is another run.
    other = config_of(lr=0.2, beta=0.5)
    assert stage_status(tmp_path, other, "dpo", VERSIONS, frozenset(["dpo.lr"]))[0] == "new"


def test_moved_path_of_a_stage_without_checkpoints(tmp_path, capsys):
    """It says what the stage goes on from, in a whole sentence."""
    config = configs.default(("pairs",))
    for name in ("old", "new"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "Name a colour."}\n')
    config.data.path = str(tmp_path / "old.jsonl")
    folder, _ = start_stage(tmp_path, config, "pairs", VERSIONS)
    (folder / "completions.jsonl").write_text("")
    config.data.path = str(tmp_path / "new.jsonl")
    assert start_stage(tmp_path, config, "pairs", VERSIONS)[1] == "unfinished"
    assert capsys.readouterr().out.endswith(
        "(its contents are equal). It goes on from its completions.\n"
    )
