"""Win rates are not found on prompts that a stage of the runs trains on, unless it is allowed."""

import functools
import json

import pytest

from dpo_jax.pipeline.run import Run
from experiments import tiny_tldr, tldr_winrate, unseen, winrate, winrate_report
from tests.experiments.test_winrate_report import a_row
from tests.helpers.tiny_runs import experiment_configs

LEAKED = 5  # of 20 test posts
MAKE_TASK = functools.partial(tldr_winrate.task, dataset="tldr", path="")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Posts and comparisons, of which some are about test posts in other spelling."""
    folder = tmp_path_factory.mktemp("unseen")
    splits = {
        # With a split of their own to validate on, all others are tested on.
        "posts": dict(
            train=tiny_tldr.posts(20, 0),
            validation=tiny_tldr.posts(3, 4),
            test=tiny_tldr.posts(20, 1),
        ),
        "comparisons": dict(train=tiny_tldr.comparisons(20, 2), test=tiny_tldr.comparisons(4, 3)),
    }
    for row in tiny_tldr.comparisons(20, 1)[:LEAKED]:
        splits["comparisons"]["train"].append(row | dict(prompt=row["prompt"].upper()))
    for name, rows_of in splits.items():
        (folder / name).mkdir()
        for split, rows in rows_of.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text)
    return folder


def runs_of(data, on_leak):
    arguments = [
        f"--config.data.path={data / 'comparisons'}",
        f"--config.data.sft_path={data / 'posts'}",
        f"--config.data.on_leak={on_leak}",
    ]
    make_config = experiment_configs("configs/tldr.py:tiny", arguments)
    return {"dpo": Run(make_config("dpo"), data, mesh=None)}


def options(prompts):
    return winrate.Options(methods=("dpo",), temperatures=(0.0,), judge=None, prompts=prompts)


def test_judged_prompts_that_are_trained_on_are_refused(data):
    with pytest.raises(ValueError, match="prompts that are to be judged are trained on") as stopped:
        unseen.task(MAKE_TASK, runs_of(data, "error"), options(20))
    told = str(stopped.value)
    assert told.startswith(f"{LEAKED} of the 20 prompts")
    assert f"{LEAKED} by dpo ({data / 'comparisons'}); 0 exactly" in told
    assert "'SUBREDDIT: r/advice" in told and "\n" not in told.replace("\\n", "")


def test_others_take_the_place_of_prompts_that_are_left_out(data):
    found = unseen.task(MAKE_TASK, runs_of(data, "drop"), options(20 - LEAKED))
    assert len(found.examples) == 20 - LEAKED
    trained = {row["prompt"] for row in tiny_tldr.posts(20, 1)[:LEAKED]}
    assert not trained & {example.prompt for example in found.examples}
    # In the order of the hashes: fewer prompts are among more.
    fewer = unseen.task(MAKE_TASK, runs_of(data, "drop"), options(6))
    assert fewer.examples == found.examples[:6]
    with pytest.raises(ValueError, match="would take the place of prompts that are trained on"):
        unseen.task(MAKE_TASK, runs_of(data, "drop"), options(20 - LEAKED + 1))


def test_allowed_prompts_are_judged_with_a_warning(data, capsys):
    runs = runs_of(data, "allow")
    found = unseen.task(MAKE_TASK, runs, options(20))
    assert found.examples == MAKE_TASK(runs, options(20)).examples
    assert f"{LEAKED} of the 20 prompts that are judged are trained on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "judge, methods, named",
    [
        (None, {"dpo", "ppo", "best_of_n"}, "best_of_n and ppo"),
        (None, {"ppo"}, "ppo"),
        (None, {"dpo", "sft"}, ""),
        ("a chat model", {"ppo"}, ""),
    ],
)
def test_judging_by_the_optimised_reward_model_is_warned_of(judge, methods, named):
    told = winrate_report.of_optimised_judge(judge, methods)
    assert bool(told) == bool(named)
    assert not named or f"the reward model that {named} optimised" in told


def test_warning_is_on_the_table_and_in_the_json(tmp_path, capsys):
    row = dict(a_row(["win", "loss", "win"], method="ppo"), judged=dict(judge="reward model"))
    warning = winrate_report.of_optimised_judge(None, {"ppo"})
    about = dict(task="tldr", against="the data", prompts=3, warning=warning)
    winrate_report.write(about, [row], tmp_path, complete=True)
    assert json.loads((tmp_path / "winrate.json").read_text())["warning"] == warning
    assert warning in (tmp_path / "winrate.md").read_text()
    assert warning in capsys.readouterr().out
