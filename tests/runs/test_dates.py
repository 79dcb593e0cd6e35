"""Chat templates that write today's date: a stage keeps the date on which it was started."""

import json
import signal

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.training import metrics
from dpo_jax.training.loop import Interrupted
from dpo_jax.whole_file import read_record, with_sha256
from dpo_jax.workdir import StageChanged
from tests.helpers.clock import set_today
from tests.helpers.tiny_runs import (
    dpo_config,
    on_devices,
    rows_without_timings,
    run,
    weights,
    write_model,
    write_pairs,
)

# Writes the day of the month as one of the tokenizer's words.
DATED = (
    "{{ '<s> w' + strftime_now('%d') }}{% for m in messages %}{{ ' ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ ' </s>' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def dated_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "model", chat_template=DATED)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chats")
    rows = []
    for line in write_pairs(folder / "texts.jsonl").read_text().splitlines():
        row = json.loads(line)
        roles = dict(prompt="user", chosen="assistant", rejected="assistant")
        chat = {name: [dict(role=role, content=row[name])] for name, role in roles.items()}
        rows.append(json.dumps(chat) + "\n")
    (folder / "chats.jsonl").write_text("".join(rows))
    return folder / "chats.jsonl"


def run_here(config, workdir):
    with on_devices(1):
        return run(config, workdir)


def interrupt(config, workdir, step):
    """Run until a step is logged, with a checkpoint before it."""
    write = metrics.Writer.write

    def stop(self, now, values):
        write(self, now, values)
        if now == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(metrics.Writer, "write", stop)
        run_here(config, workdir)


def test_run_resumes_on_another_day(dated_model, chats, tmp_path, monkeypatch):
    config = dpo_config(dated_model, chats)
    set_today(monkeypatch, "2026-11-26")
    uninterrupted = run_here(config, tmp_path / "uninterrupted")
    interrupt(config, tmp_path, step=3)
    set_today(monkeypatch, "2026-11-27")
    resumed = run_here(config, tmp_path)
    assert rows_without_timings(resumed) == rows_without_timings(uninterrupted)
    for name, value in weights(uninterrupted).items():
        np.testing.assert_array_equal(weights(resumed)[name], value)


def test_date_changes_the_tokens(dated_model, chats, tmp_path, monkeypatch):
    """So a stage that did not keep it could not be resumed."""
    config = dpo_config(dated_model, chats)
    set_today(monkeypatch, "2026-11-26")
    interrupt(config, tmp_path, step=3)
    path = tmp_path / "dpo" / "config.json"
    record = read_record(path, remedy="")
    path.write_text(json.dumps(with_sha256(record | dict(date="2026-11-27"))))
    with pytest.raises(StageChanged, match="the data of .*dpo has changed since the stage began"):
        run_here(config, tmp_path)


def test_later_stage_has_its_own_date(dated_model, chats, tmp_path, monkeypatch, capsys):
    config = configs.default(("sft", "dpo"))
    changes = dpo_config(dated_model, chats, steps=1)
    config.model.update(changes.model)
    config.data.update(changes.data)
    config.data.show = 1
    config.dpo.update(changes.dpo)
    config.sft.update(steps=1, batch_size=8, warmup_steps=0)
    set_today(monkeypatch, "2026-11-26")
    config.stages = ("sft",)
    run_here(config, tmp_path)
    assert "<s> w26" in capsys.readouterr().out
    set_today(monkeypatch, "2026-11-27")
    config.stages = ("sft", "dpo")
    run_here(config, tmp_path)
    told = capsys.readouterr().out
    assert "<s> w27" in told and "<s> w26" not in told


def test_sweep_on_several_days_shares_the_reference(
    dated_model, chats, tmp_path, monkeypatch, capsys
):
    set_today(monkeypatch, "2026-11-26")
    config = dpo_config(dated_model, chats, steps=2, cache_reference=True)
    run_here(config, tmp_path)
    kept = set((tmp_path / "reference").iterdir())
    capsys.readouterr()
    set_today(monkeypatch, "2026-11-27")
    config = dpo_config(dated_model, chats, steps=2, cache_reference=True, beta=0.5)
    config.run = "dpo-beta0.5"
    run_here(config, tmp_path)
    assert capsys.readouterr().out.count("rows are in") == 2
    assert set((tmp_path / "reference").iterdir()) == kept
