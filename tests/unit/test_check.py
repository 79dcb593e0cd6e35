"""What `dpo-jax check` says of what runs, `sample` and judges have left."""

import hashlib
import json

import jax.numpy as jnp
import pytest

from dpo_jax import check, workdir
from dpo_jax.training import step
from dpo_jax.training.checkpoint import Checkpoints
from dpo_jax.whole_file import with_sha256
from dpo_jax.workdir import SealedRows, finish_stage, write_json, write_record
from tests.helpers.rows import change_record


def start(folder):
    folder.mkdir(parents=True)
    write_record(folder / "config.json", dict(stage="dpo", depends_on={}, config={}))


def save(folder, *steps):
    with Checkpoints(folder / "checkpoints", keep=len(steps)) as saved:
        for number in steps:
            state = step.TrainState(jnp.int32(number), {"w": jnp.full(2000, float(number))}, ())
            saved.save(number, state, rows=dict(rows=0, sha256=hashlib.sha256().hexdigest()))
    (folder / "metrics.jsonl").write_text("")


def damage(folder, number):
    (folder / "checkpoints" / str(number) / "_CHECKPOINT_METADATA").write_text("{}")


def said(root) -> dict[str, str]:
    """Return what is said of each part that is not whole, by its path."""
    found = {}
    for path, problem, note in check.check(root):
        if problem or note:
            found[str(path.relative_to(root))] = problem or note
    return found


@pytest.fixture
def folder(tmp_path):
    start(tmp_path / "dpo")
    return tmp_path / "dpo"


def test_what_a_damaged_checkpoint_means(folder):
    save(folder, 1, 2, 3)
    assert said(folder.parent) == {}
    damage(folder, 3)
    damage(folder, 1)
    found = said(folder.parent)
    assert set(found) == {"dpo/checkpoints/1", "dpo/checkpoints/3"}
    assert found["dpo/checkpoints/3"].endswith(". A resumed run passes it over for step 2")
    assert ". A resumed run begins at step 2; it is read only if" in found["dpo/checkpoints/1"]

    damage(folder, 2)
    found = said(folder.parent)
    assert len(found) == 3
    for text in found.values():
        assert "so a resumed run stops. Put it back from a copy, or remove" in text
        assert "passes it over" not in text

    finish_stage(folder)
    assert "The stage is finished: it is read only if" in said(folder.parent)["dpo/checkpoints/3"]


def test_record_that_is_gone(folder):
    (folder / "done.json").write_text("{}")
    (folder / "config.json").unlink()
    (text,) = said(folder.parent).values()
    remedy = f"Put it back from a copy, or remove {folder}, which is then made again"
    assert text == f"{folder / 'config.json'} is gone. {remedy}"


def test_stage_that_an_earlier_version_finished(folder, capsys):
    (folder / "hf").mkdir()
    (folder / "hf" / "model.safetensors").write_text("weights")
    finish_stage(folder)
    assert said(folder.parent) == {}
    change_record(folder / "done.json", lambda record: record.pop(workdir.FILES))
    note = "not recorded (finished by an earlier version)"
    assert said(folder.parent) == {"dpo/hf": note}
    # Nothing is known to be wrong.
    assert check.report(folder.parent) == 0
    assert capsys.readouterr().out.endswith("2 of 3 are whole, 1 not recorded\n")


def test_checkpoint_that_an_earlier_version_saved(folder):
    """A finished stage of that version is used as it is; an unfinished one is refused."""
    save(folder, 1)
    path = folder / "checkpoints" / "1" / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    path.write_text(json.dumps(metadata | dict(custom_metadata={})))
    assert "1 has no sums to check it by" in said(folder.parent)["dpo/checkpoints/1"]
    finish_stage(folder)
    assert said(folder.parent) == {"dpo/checkpoints/1": check.FINISHED_EARLIER}
    assert check.report(folder.parent) == 0

    damage(folder, 1)
    assert "The stage is finished: it is read" in said(folder.parent)["dpo/checkpoints/1"]


def test_result_of_an_earlier_end(folder):
    (folder / "hf").mkdir()
    (folder / "hf" / "model.safetensors").write_text("weights")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    finish_stage(folder)
    workdir._set_result_aside(folder, 1)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert said(folder.parent) == {}
    kept = folder / "results" / "1"
    # The stage's command writes none of it again.
    remedy = f"Put it back from a copy, or remove {kept}: no stage reads it."
    (kept / "hf" / "model.safetensors").write_text("Weights")
    ((where, text),) = said(folder.parent).items()
    assert where == "dpo/results/1/hf/model.safetensors"
    assert text.endswith(f"its sha256 is not that of what was written. {remedy}")
    (kept / "hf" / "model.safetensors").unlink()
    gone = f"{kept / 'hf' / 'model.safetensors'} is gone. {remedy}"
    assert said(folder.parent) == {where: gone}

    write_record(kept / "done.json", dict(files={"hf/model.safetensors": {}}))
    (text,) = said(folder.parent).values()
    assert text.endswith(f"it was changed. {remedy}")
    (kept / "done.json").write_text("{")
    (text,) = said(folder.parent).values()
    assert text.endswith(f"its 1 bytes are not JSON. {remedy}")
    (kept / "done.json").unlink()
    assert said(folder.parent) == {
        "dpo/results/1/done.json": f"{kept / 'done.json'} is gone. {remedy}"
    }


def test_rows_of_sample(tmp_path):
    for out, sums in (("out.jsonl", "out.jsonl.sums"), ("samples/completions.jsonl", "")):
        path = tmp_path / out
        path.parent.mkdir(exist_ok=True)
        sums = path.with_name(sums or "completions.sums")
        kept = SealedRows(path, sums)
        for number in range(3):
            kept.append([dict(completion=f"answer {number}")])
    write_record(tmp_path / "out.jsonl.settings.json", dict(model="m"))
    write_record(tmp_path / "samples" / "settings.json", dict(model="m"))
    assert said(tmp_path) == {} and check.report(tmp_path) == 0

    for out in ("out.jsonl", "samples/completions.jsonl"):
        path = tmp_path / out
        path.write_text(path.read_text().replace("answer 1", "answer 7"))
    write_json(tmp_path / "out.jsonl.settings.json", with_sha256({}) | dict(model="other"))
    found = said(tmp_path)
    assert found.keys() == {"out.jsonl", "out.jsonl.settings.json", "samples/completions.jsonl"}
    assert found["out.jsonl"].endswith(
        "is not what was written there from row 2 on. The command that makes them makes them again"
    )
    (tmp_path / "out.jsonl.sums").unlink()
    assert said(tmp_path)["out.jsonl"] == "not recorded (out.jsonl.sums is not there)"


def test_answers_of_a_judge(tmp_path):
    path = tmp_path / "winrate" / "hh" / "judge" / "judgements.jsonl"
    path.parent.mkdir(parents=True)
    row = dict(key="1", prompt="Which?", answer="Better: A", usage=None)
    line = json.dumps(with_sha256(row)) + "\n"
    path.write_text(line)
    assert said(tmp_path) == {}
    path.write_text(line + line.replace("Better: A", "Better: B"))
    (text,) = said(tmp_path).values()
    assert f"{path} line 2 is not a kept call, or not what was written there" in text


def test_folder_above_a_workdir_is_refused(tmp_path):
    """Else a part of each stage would pass for all of it."""
    folder = tmp_path / "run" / "pairs"
    start(folder)
    SealedRows(folder / "completions.jsonl", folder / "completions.sums").append([dict(a=1)])
    assert check.report(tmp_path / "run") == 0
    with pytest.raises(ValueError, match="holds nothing that a run has left"):
        check.report(tmp_path)
