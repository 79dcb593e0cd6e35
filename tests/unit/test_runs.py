"""The list of runs: what each line says, and what broken or foreign folders make of it."""

import fcntl
import json
import os
import subprocess
import sys
import time

import pytest

from dpo_jax import config_files, runs
from tests.helpers.stage_folders import write_stage


def lines_of(workdir) -> dict[str, list[str]]:
    """Return the table's lines by their first word, split where columns are."""
    lines = [line.split() for line in runs.table(workdir).splitlines()]
    return {words[0]: words[1:] for words in lines if words}


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "toy"


def test_line_of_finished_run(workdir):
    evaluation = {
        "loss/eval": 0.42918,
        "rewards_eval/accuracies": 0.81,
        "frontier/reward": -0.39614,
        "frontier/kl": 0.25424,
    }
    write_stage(
        workdir, "dpo-beta0.5", "dpo", fields={"dpo.beta": "0.5"}, done=dict(evaluation=evaluation)
    )
    line = lines_of(workdir)["dpo-beta0.5"]
    finished = ["finished", "2026-01-02", "03:04"]
    assert line == ["dpo", "0.4292", "0.81", "-0.3961", "0.2542", *finished, "dpo.beta=0.5"]


def test_line_of_run_that_ended_early(workdir):
    ended = dict(step=80, steps=240, metric="loss/eval", best_step=40)
    write_stage(workdir, "dpo", "dpo", done=dict(early_stop=ended))
    assert "finished 2026-01-02 03:04, early at step 80 of 240" in runs.table(workdir)


def test_line_of_stopped_run(workdir):
    rows = [
        {"step": 0, "loss/eval": 0.6931, "rewards_eval/accuracies": 0.0},
        {"step": 7, "loss/train": 0.5, "rewards_train/accuracies": 0.75},
    ]
    folder = write_stage(workdir, "dpo", "dpo", rows=rows)
    (folder / "checkpoints" / "5").mkdir(parents=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss/tr')  # cut off by a kill
    line = " ".join(lines_of(workdir)["dpo"])
    assert line == "dpo 0.6931 0 - - stopped at step 7 of 240, saved at 5"


def test_table_of_many_long_runs(workdir):
    """Each has megabytes of metrics, of which the end is read, and one of a few sets of defaults.

    Reading all took 5 seconds for 200 runs.
    """
    rows = [{"step": step, "loss/train": 0.1234567890123} for step in range(20_000)]
    rows[10_000]["loss/eval"] = 0.75  # in reach, but far from the end
    first = write_stage(workdir, "dpo", "dpo", rows=rows)
    for number in range(60):
        folder = workdir / f"dpo-{number}"
        folder.mkdir()
        for name in ("config.json", "metrics.jsonl"):
            (folder / name).hardlink_to(first / name)
        (folder / "done.json").write_text('{"evaluation": {"loss/eval": 0.5}, "finished": "now"}')
    began = time.process_time()
    lines = lines_of(workdir)
    assert time.process_time() - began < 1
    assert lines["dpo"][1] == "0.75" and lines["dpo-59"][1] == "0.5"
    assert len([name for name in lines if name.startswith("dpo-")]) == 60


def test_training_values_are_marked(workdir):
    write_stage(workdir, "rm", "rm", "toy:ppo", rows=[{"step": 3, "loss/train": 0.25}])
    assert lines_of(workdir)["rm"][:3] == ["rm", "0.25*", "-"]


def test_line_of_run_in_progress(workdir):
    folder = write_stage(workdir, "dpo", "dpo", rows=[{"step": 3, "loss/train": 0.25}])
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "running at step 3 of 240" in runs.table(workdir)
    assert "stopped at step 3 of 240" in runs.table(workdir)


def test_lines_are_in_order(workdir):
    for name in ("dpo-beta5.0", "dpo-beta0.5", "dpo-beta10.0"):
        write_stage(workdir, name, "dpo")
    write_stage(workdir, "sft", "sft")
    found = [line.split()[0] for line in runs.table(workdir).splitlines()[2:]]
    assert found == ["sft", "dpo-beta0.5", "dpo-beta5.0", "dpo-beta10.0"]


def test_changes_against_config_file(workdir, tmp_path):
    write_stage(workdir, "ppo", "ppo", "toy:ppo_gt")
    assert "ppo.steps" not in runs.table(workdir)
    other = tmp_path / "mine"
    write_stage(other, "ppo", "ppo", "toy:ppo_gt")
    assert "ppo.steps=40" in runs.table(other)


def test_changed_field_is_in_the_row_of_its_stage(workdir):
    fields = {"dpo.beta": "3", "sft.lr": "0.5", "evaluate.prompts": "8", "seed": "7"}
    for stage in ("sft", "dpo", "evaluate"):
        write_stage(workdir, stage, stage, fields=fields)
    write_stage(workdir, "dpo-other", "dpo")
    lines = lines_of(workdir)
    changed = {}
    for name in ("sft", "dpo", "dpo-other", "evaluate"):
        changed[name] = [word for word in lines[name] if "=" in word]
    assert changed == {
        "sft": ["seed=7,", "sft.lr=0.5"],
        "dpo": ["seed=7,", "dpo.beta=3"],
        "dpo-other": [],
        "evaluate": ["seed=7,", "evaluate.prompts=8"],
    }


def test_common_changes_are_said_once(workdir):
    shared = {"sft.lr": "0.5"}
    write_stage(workdir, "a", "dpo", fields=shared | {"dpo.beta": "1"})
    write_stage(workdir, "b", "dpo", fields=shared | {"dpo.beta": "3"})
    text = runs.table(workdir)
    assert text.count("sft.lr=0.5") == 1 and "all: sft.lr=0.5" in text
    assert "dpo.beta=1" in text and "dpo.beta=3" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json is not JSON"),
        ("[]", "config.json is not a JSON object"),
        ("{}", "config.json has no 'stage' of a run"),
        ('{"model_type": "gpt2"}', "config.json has no 'stage' of a run"),
        (
            '{"stage": "sft", "depends_on": {}, "config": {"stages": 3}}',
            "config.json has no 'stages' of a run",
        ),
    ],
)
def test_line_of_broken_folder(workdir, text, said):
    write_stage(workdir, "sft", "sft")
    (workdir / "broken").mkdir()
    (workdir / "broken" / "config.json").write_text(text)
    (workdir / "reference").mkdir()
    (workdir / "notes.txt").write_text("mine")
    lines = runs.table(workdir).splitlines()
    assert f"broken: cannot be read: {said}" in lines
    assert "other folders: reference" in lines
    assert lines[2].startswith("sft ")


def test_line_of_other_version(workdir):
    folder = write_stage(workdir, "dpo", "dpo")
    started = json.loads((folder / "config.json").read_text())
    started["config"]["stages"] = ["sft", "gone"]
    (folder / "config.json").write_text(json.dumps(started))
    assert "a config of another version" in runs.table(workdir)


def test_columns_are_aligned(workdir):
    write_stage(workdir, "a_rather_long_name", "dpo", done={})
    write_stage(workdir, "b", "dpo", done={})
    head, first, second = runs.table(workdir).splitlines()[1:]
    assert head.index("status") == first.index("finished") == second.index("finished")


def command(*arguments, cwd):
    # The package first, then what the tests themselves were found by.
    path = os.pathsep.join([str(config_files.SHIPPED.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", "import dpo_jax.runs as r; r.main(); ", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path.strip(os.pathsep)},
        text=True,
        capture_output=True,
    )


def test_runs_of_a_sweep_are_listed_and_what_they_share_once(workdir):
    """Folders within that hold no stage, such as one of models, are none of its WORKDIRs."""
    write_stage(workdir, "sft", "sft")
    for prompts in (1000, 200):
        within = workdir / f"pairs.prompts{prompts}"
        write_stage(within, "dpo", "dpo")
        (within / "sft").symlink_to(os.path.join("..", "sft"))
    (workdir / "models" / "small").mkdir(parents=True)
    (workdir / "models" / "small" / "config.json").write_text('{"model_type": "llama"}')
    (workdir / "latest").symlink_to(".")
    lines = lines_of(workdir)
    listed = [name for name in lines if name.rpartition("/")[2] in ("sft", "dpo")]
    assert listed == ["sft", "pairs.prompts200/dpo", "pairs.prompts1000/dpo"]
    assert lines["other"] == ["folders:", "latest,", "models"]


def test_overview_of_folder(tmp_path):
    write_stage(tmp_path / "runs" / "toy", "sft", "sft", done={})
    write_stage(tmp_path / "runs" / "toy", "dpo", "dpo")
    (tmp_path / "runs" / "empty").mkdir()
    done = command(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1][:3] == ["runs/toy", "2", "1"] and "empty" not in done.stdout


def test_missing_workdir_is_refused(tmp_path):
    done = command("nowhere", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: nowhere: there is no such")


def test_runs_writes_nothing_without_jax(workdir):
    write_stage(workdir, "sft", "sft", done={})
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    code = "import sys, dpo_jax.runs; sys.exit('jax' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=config_files.SHIPPED.parent)
    runs.table(workdir)
    assert found.returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
