"""What a run says about rows of a prompt that it reads apart, and the flags that would help."""

import itertools
import re

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.data.batches import Batches, microbatches_of, training_order
from dpo_jax.data.examples import Example
from dpo_jax.training.data_feed import say_what_cells_lose, say_what_groups_save
from tests.helpers.tiny_runs import (
    dpo_config,
    on_devices,
    run,
    write_groups,
    write_model,
    write_pairs,
)


def pairs_of(group_sizes: list[int], prompt_tokens: int = 40):
    """Return (pairs, groups) of prompts with so many pairs each, all of different responses."""
    numbers = itertools.count()
    pairs = []
    groups = []
    for group, size in enumerate(group_sizes):
        prompt = np.full(prompt_tokens, group, np.int32)
        for _ in range(size):
            responses = tuple(np.full(5, next(numbers), np.int32) for _ in range(2))
            pairs.append(Example(prompt, responses))
            groups.append(group)
    return pairs, np.array(groups)


def lines_of_cells(capsys, group_sizes, shards, **sizes) -> list[str]:
    """Return what is said of cells of whole groups, in the order of the data."""
    block = configs.default(("dpo",)).dpo
    block.update(sizes)
    pairs, groups = pairs_of(group_sizes)
    order = np.arange(len(pairs) // block.batch_size * block.batch_size)
    batches = Batches(
        pairs,
        order.reshape(-1, block.batch_size),
        microbatches=microbatches_of(block),
        shards=shards,
    )
    say_what_cells_lose("dpo", block, batches, pairs, groups)
    return capsys.readouterr().out.splitlines()


def test_larger_microbatches_come_first_and_alone_where_they_are_enough(capsys):
    lost, advice = lines_of_cells(capsys, [6] * 64, 2, batch_size=48, microbatch_size=8)
    assert lost.startswith("dpo: the 12 cells of a step (microbatches x data shards) have 4 rows")
    assert "each, and prompts have up to 6, so prompts are read more than once" in lost
    flags, _, effect = advice.partition(" changes no update")
    assert re.fullmatch(r"dpo: --config.dpo.microbatch_size=\d+", flags)
    assert "reads about 17 tokens a row instead of 23" in effect


def test_larger_batch_is_said_to_make_fewer_updates(capsys):
    lines = lines_of_cells(capsys, [6] * 64, 8, batch_size=8)
    assert len(lines) == 2
    assert "have 1 row each, and prompts have up to 6, so" in lines[0]
    assert "--config.dpo.batch_size=48 makes fewer updates an epoch" in lines[1]


def test_mixed_groups_are_measured_by_the_largest(capsys):
    """Most prompts have one pair, so cells hold more rows than a prompt has on average."""
    group_sizes = [12, 1, 1, 1, 1] * 40
    lines = lines_of_cells(capsys, group_sizes, 8, batch_size=64, microbatch_size=16)
    assert "have 2 rows each, and prompts have up to 12, so" in lines[0]
    assert "--config.dpo.microbatch_size=32 changes no update" in lines[1]
    assert len(lines) == 2


@pytest.mark.parametrize(("group_sizes", "shards"), [([6] * 64, 1), ([1] * 64, 8)])
def test_nothing_is_said_where_nothing_is_lost(capsys, group_sizes, shards):
    assert lines_of_cells(capsys, group_sizes, shards, batch_size=48) == []


def test_order_by_prompts_is_proposed_with_its_tokens(capsys):
    pairs, groups = pairs_of([4] * 50)
    batches = Batches(pairs, training_order(200, 8, 25, seed=0))
    say_what_groups_save("dpo", batches, pairs, groups, seed=0)
    grouped = Batches(pairs, training_order(200, 8, 25, 0, groups))
    then = grouped.reading().tokens / 25
    now = batches.reading().tokens / 25
    assert then < 0.7 * now
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("dpo: --config.data.order=prompts would")
    assert line.endswith(f"read about {then:.0f} tokens a step instead of {now:.0f}")

    # The prompt is a small part of what is read.
    pairs, groups = pairs_of([2] * 50, prompt_tokens=1)
    batches = Batches(pairs, training_order(100, 8, 12, seed=0))
    say_what_groups_save("dpo", batches, pairs, groups, seed=0)
    assert capsys.readouterr().out == ""


def test_run_proposes_the_other_order_once(tmp_path, capsys):
    model = write_model(tmp_path / "model")
    pairs = write_groups(tmp_path / "groups.jsonl", write_pairs(tmp_path / "pairs.jsonl"))
    for shuffled, lines in (("pairs", 1), ("prompts", 0)):
        config = dpo_config(model, pairs, steps=2, data__order=shuffled)
        with on_devices(1):
            run(config, tmp_path / shuffled)
        assert capsys.readouterr().out.count("--config.data.order=prompts would") == lines
