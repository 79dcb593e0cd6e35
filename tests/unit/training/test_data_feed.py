"""What the feed says of uneven batches, and of a reference that moves in vain."""

import re
import types

import jax
import pytest
from ml_collections import ConfigDict

from dpo_jax.models import attention
from dpo_jax.parallel import sharding
from dpo_jax.training import data_feed
from tests.helpers.tiny import tiny_config


@pytest.mark.parametrize(
    "batch_size, microbatch_size, shards, advice",
    [
        (12, 0, 8, "A multiple of 8 as config.dpo.batch_size"),
        (12, 3, 2, "A multiple of 2 as config.dpo.microbatch_size"),
        (6, 2, 8, "A multiple of 8 as config.dpo.batch_size"),
    ],
)
def test_advice_for_uneven_shards_is_even(batch_size, microbatch_size, shards, advice, capsys):
    block = ConfigDict(dict(batch_size=batch_size, microbatch_size=microbatch_size))
    data_feed.say_uneven_shards("dpo", block, shards)
    assert advice in capsys.readouterr().out
    if "microbatch" in advice:
        block.microbatch_size = 2
    else:
        block.update(batch_size=8, microbatch_size=0)
    data_feed.say_uneven_shards("dpo", block, shards)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "every, mix, steps, told",
    [
        (512, 1.0, 3, ["ends before a step sees a moved reference (config.dpo.reference_every = "]),
        (3, 0.6, 3, ["ends before a step sees a moved reference"]),
        (3, 1.0, 3, ["ends before a step sees", "compares the policy with itself"]),
        (3, 1.0, 6, ["compares the policy with itself"]),
        (3, 0.6, 6, []),
        (3, 1.0, 7, []),
    ],
)
def test_reference_that_moves_in_vain(every, mix, steps, told, capsys):
    block = ConfigDict(dict(reference_every=every, reference_mix=mix))
    data_feed.say_moves_in_vain("dpo", block, steps)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(told)
    for line, part in zip(lines, told, strict=True):
        assert part in line


@pytest.mark.parametrize(
    "fields, told",
    [
        (dict(dtype="bfloat16"), ""),
        (dict(dtype="float32"), "cuDNN takes 16-bit numbers"),
        (dict(dtype="bfloat16", attention_softcap=50.0), "plain XLA, .* no soft cap of scores"),
        (
            dict(dtype="bfloat16", head_width=256),
            "heads of a multiple of 8 up to 128 wide, not 256",
        ),
        (dict(dtype="float32", attention="xla"), ""),
    ],
)
def test_plain_attention_on_a_gpu_is_said(fields, told, monkeypatch, capsys):
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(attention, "device", lambda: gpu)
    monkeypatch.setattr(data_feed.sharding, "platform_of", lambda mesh: "gpu")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    data_feed.say_plain_attention("dpo", tiny_config(**dict(head_width=8) | fields), mesh)
    said = capsys.readouterr().out
    assert re.search(told, said) if told else not said
