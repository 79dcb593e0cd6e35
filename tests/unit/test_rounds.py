"""What a round is: its folders, what it depends on, its seeds, and which configs have rounds."""

import datetime

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax import config_checks, stage_table, workdir
from dpo_jax.models import loading
from dpo_jax.pipeline import exports
from dpo_jax.pipeline.run import PURPOSES, Run
from dpo_jax.workdir import finish_stage, read_config, start_stage

STAGES = ("sft", "pairs", "rm", "dpo", "evaluate")


def config_of(*stages: str, rounds: int = 3):
    """Return a valid config of a run of rounds."""
    config = configs.default(stages or STAGES)
    config.model.path = config.data.path = "PATH"
    config.rounds = rounds
    return config


def test_folders_of_a_later_round():
    config = config_of()
    assert configs.folder_names(configs.of_round(config, 1)) == {name: name for name in STAGES}
    names = configs.folder_names(config)
    assert names == {name: f"round_3/{name}" for name in STAGES} | {"sft": "sft"}
    assert config.rounds == 3  # of_round leaves it alone


def test_folders_of_a_later_round_have_the_runs_name():
    """All of them come after a stage of that name."""
    config = config_of()
    config.run = "dpo-beta0.5"
    names = configs.folder_names(config)
    assert names == dict(
        sft="sft",
        pairs="round_3/pairs-dpo-beta0.5",
        rm="round_3/rm-dpo-beta0.5",
        dpo="round_3/dpo-beta0.5",
        evaluate="round_3/evaluate-dpo-beta0.5",
    )


@pytest.mark.parametrize("name", ["round_2", "round_30"])
def test_a_run_is_not_called_as_a_round(name):
    config = config_of(rounds=1)
    config.run = name
    with pytest.raises(ValueError, match=r"config.run = 'round_\d+': .* or a round's"):
        config_checks.validate(config)
    config.run = f"{name}b"
    config_checks.validate(config)


def test_round_1_depends_on_what_a_run_without_rounds_does():
    for stage in STAGES:
        first = configs.dependencies(configs.of_round(config_of(), 1), stage)
        assert first == configs.dependencies(config_of(rounds=1), stage)
        assert "rounds" not in first


def test_a_later_round_depends_on_the_policy_before_it():
    config = config_of()
    assert "rounds" not in configs.dependencies(config, "sft")
    found = configs.dependencies(config, "pairs")
    assert found["rounds"] == 3 and found["stages"] == ["sft", "pairs", "rm", "dpo"]
    # The policy is measured while it is trained, and keep_best may choose by that.
    assert {"dpo.beta", "rm.lr", "evaluate.prompts", "data.order"} <= found.keys()
    for stage in ("rm", "dpo", "evaluate"):
        assert found.keys() <= configs.dependencies(config, stage).keys()


def test_default_of_a_new_field_is_known_in_later_rounds(tmp_path):
    """A record that lacks a field is taken as one with its default, as in round 1."""
    config = config_of()
    for number in (1, 2):
        in_round = configs.of_round(config, number)
        folder, _ = start_stage(tmp_path, in_round, "pairs", {})
        record = read_config(folder)
        for name in ("pairs.choose", "dpo.dpop_lambda"):
            record["depends_on"].pop(name, None)
        workdir.write_record(folder / "config.json", record)
        finish_stage(folder)
        status, changes = workdir.stage_status(tmp_path, in_round, "pairs", {})
        assert (status, changes) == ("done", [])


def test_a_later_round_has_the_day_of_round_1(tmp_path, monkeypatch):
    """Chat templates that tell the date give all rounds the same held-out prompts."""
    config = config_of()
    first, _ = start_stage(tmp_path, configs.of_round(config, 1), "pairs", {})
    day = workdir.start_date(first)

    class Later(datetime.date):
        @classmethod
        def today(cls):
            return day + datetime.timedelta(days=1)

    monkeypatch.setattr(datetime, "date", Later)
    folder, _ = start_stage(tmp_path, configs.of_round(config, 2), "pairs", {})
    assert folder.parent.name == "round_2"
    assert workdir.start_date(folder) == day


def test_seeds_of_rounds(tmp_path):
    """Round 1 has the config's own; others have one of their own for each purpose."""
    run = Run(config_of(), tmp_path, mesh=None, rounds=3)
    run.config.seed = 7
    assert {run.of_round(1).seed("dpo", purpose) for purpose in PURPOSES} == {7}
    seeds = [run.of_round(number).seed("dpo", purpose) for number in (2, 3) for purpose in PURPOSES]
    assert len({*seeds, 7}) == 1 + 2 * len(PURPOSES)
    assert all(0 <= seed <= configs.SEEDS for seed in seeds)
    expected = np.random.SeedSequence(7, spawn_key=(0, 2)).generate_state(1)
    assert run.of_round(2).seed("pairs", "sampling") == expected
    # What is measured has the same draws in all rounds.
    assert run.of_round(2).measuring("evaluate").seed == 7


def test_seed_of_a_stage_moves_that_stage_alone(tmp_path):
    """In every round."""
    run = Run(config_of(), tmp_path, mesh=None, rounds=2)
    run.config.seed = 7

    def seeds(number):
        in_round = run.of_round(number)
        return {stage: in_round.seed(stage, "sampling") for stage in run.config.stages}

    before = {number: seeds(number) for number in (1, 2)}
    for stage in run.config.stages:
        run.config[stage].seed = 3
        for number in (1, 2):
            assert seeds(number) == before[number] | {stage: before[number][stage] + 3}
        run.config[stage].seed = 0
    run.config.evaluate.seed = 2
    assert run.measuring("evaluate").seed == 9


def test_last_stage_is_of_the_last_round(tmp_path):
    """Earlier ones are what later rounds start from, exactly."""
    config = config_of()
    config.export.dtype = "bfloat16"
    run = Run(config, tmp_path, mesh=None, rounds=3)
    stored = {}
    for number in (1, 2, 3):
        for stage in ("rm", "dpo"):
            is_last = run.of_round(number).is_last(stage)
            stored[number, stage] = exports.dtype_of(config, is_last, "bfloat16")
    assert stored.pop((3, "dpo")) == "bfloat16"
    assert set(stored.values()) == {"float32"}


def test_what_stages_of_a_later_round_start_from(tmp_path, monkeypatch):
    """A reward model starts anew, and sft is of no round."""
    opened = []
    monkeypatch.setattr(Run, "_result", lambda self, folder: opened.append(folder))
    monkeypatch.setattr(loading, "open_checkpoint", lambda path, **_: opened.append(path))
    run = Run(config_of(), tmp_path, mesh=None, rounds=3)
    for stage in STAGES:
        run.initial(stage)
    policy, first = tmp_path / "round_2" / "dpo", tmp_path / "sft"
    assert opened == ["PATH", policy, first, policy, policy]
    opened.clear()
    run.of_round(2).initial("pairs")
    run.of_round(1).initial("pairs")
    assert opened == [tmp_path / "dpo", first]


@pytest.mark.parametrize(
    "reference, first, later", [("init", "init", "init"), ("first", "init", "first")]
)
def test_reference_of_a_round(reference, first, later):
    config = config_of()
    config.dpo.reference = reference
    config_checks.validate(config)
    assert stage_table.reference_of(configs.of_round(config, 1), "dpo") == first
    assert stage_table.reference_of(configs.of_round(config, 2), "dpo") == later


@pytest.mark.parametrize(
    "stages, expected",
    [
        (("sft", "dpo"), "expected 1, as nothing is sampled"),
        (("sft", "unlikelihood", "evaluate"), "expected 1, as nothing is sampled"),
        (("sft", "pairs", "rm", "best_of_n"), "expected 1, as no stage of config.stages"),
    ],
)
def test_configs_without_rounds(stages, expected):
    config = config_of(*stages, rounds=2)
    with pytest.raises(ValueError, match="config.rounds = 2") as error:
        config_checks.validate(config)
    assert expected in str(error.value) and "\n" not in str(error.value)
    config.rounds = 1
    config_checks.validate(config)


@pytest.mark.parametrize("rounds", [0, -1, 1001])
def test_number_of_rounds(rounds):
    with pytest.raises(ValueError, match=f"config.rounds = {rounds}: expected at"):
        config_checks.validate(config_of(rounds=rounds))
