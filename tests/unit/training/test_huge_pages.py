"""When a run says that huge pages would help."""

import types

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax import console
from dpo_jax.parallel import hardware
from dpo_jax.training import data_feed
from tests.helpers.tiny import tiny_config
from tests.helpers.tiny_runs import on_devices, run, write_model, write_pairs

ENOUGH = data_feed.GAINS_BY_HUGE_PAGES // (2 * 100)  # tokens, with two layers of width 100


@pytest.mark.parametrize(
    ("platform", "tokens", "lacks", "gains"),
    [
        ("cpu", ENOUGH, True, True),
        ("cpu", ENOUGH - 1, True, False),
        ("cpu", ENOUGH, False, False),
        ("tpu", 10**9, True, False),
        ("gpu", 10**9, True, False),
    ],
)
def test_huge_pages_are_for_large_steps_on_a_cpu(monkeypatch, platform, tokens, lacks, gains):
    monkeypatch.setattr(hardware, "lacks_huge_pages", lambda: lacks)
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device]))
    model = tiny_config(width=100)
    assert data_feed.gains_by_huge_pages(model, mesh, tokens) is gains


@pytest.mark.slow
def test_huge_pages_are_mentioned_once_in_a_run_of_two_stages(tmp_path, monkeypatch, capsys):
    console.say_once.cache_clear()
    monkeypatch.setattr(data_feed, "gains_by_huge_pages", lambda *_: True)
    pairs = write_pairs(tmp_path / "pairs.jsonl", 10)
    config = configs.default(("sft", "dpo"))
    config.model.path = str(write_model(tmp_path / "model"))
    config.data.path = str(pairs)
    for stage in config.stages:
        config[stage].update(batch_size=4, steps=1)
    with on_devices(1):
        run(config, tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("sft: ") for line in lines)
    assert any(line.startswith("dpo: ") for line in lines)
    (line,) = [line for line in lines if "huge pages" in line]
    assert "`export GLIBC_TUNABLES=glibc.malloc.hugetlb=1`" in line
