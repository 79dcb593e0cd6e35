"""The examples that a plan makes up: what a prompt's pairs share, and where it is lost."""

import itertools
import json

import numpy as np
import pytest

from dpo_jax import config as configs
from dpo_jax.data.ledger import Reading
from dpo_jax.data.packing import Contents
from dpo_jax.models import flops
from dpo_jax.planning import groups, planner, topologies
from dpo_jax.planning import report as report_lib
from dpo_jax.planning.groups import Group
from dpo_jax.planning.planner import Assumptions
from dpo_jax.training.data_feed import DataFeed
from tests.helpers.tiny_runs import (
    SCRATCH,
    dpo_config,
    on_devices,
    run,
    scratch_config,
    write_model,
)

pytestmark = pytest.mark.usefixtures("without_gpu_compiler")

IMDB = Group(prompt_tokens=8, response_tokens=60, pairs=6, responses=4)
TLDR = Group(prompt_tokens=512, response_tokens=128, pairs=4, responses=5)


@pytest.mark.parametrize(
    ("pairs", "responses"), [(1, 2), (6, 4), (4, 5), (3, 5), (2, 4), (5, 4), (10, 5)]
)
def test_group_uses_every_response(pairs, responses):
    found = Group(1, 1, pairs, responses).index_pairs()
    assert len(set(found)) == pairs
    assert all(first < second for first, second in found)
    assert set(itertools.chain(*found)) == set(range(responses))


@pytest.mark.parametrize(("pairs", "responses"), [(7, 4), (2, 5), (2, 2)])
def test_group_that_cannot_be(pairs, responses):
    with pytest.raises(ValueError, match=f"{pairs} pairs a prompt cannot be made of {responses}"):
        Group(1, 1, pairs, responses)


@pytest.mark.parametrize(("pairs", "responses"), [(-1, 2), (1, 1), (0, 2)])
def test_group_of_too_few(pairs, responses):
    with pytest.raises(ValueError, match="expected at least 1 pair .* and 2 responses"):
        Group(1, 1, pairs, responses)


@pytest.mark.parametrize(
    ("choose", "pairs", "responses"), [("all", 6, 4), ("best_worst", 1, 2), ("best_random", 1, 2)]
)
def test_group_of_own_pairs(choose, pairs, responses):
    """Of four completions, all pairs or the one that is taken."""
    config = configs.default(("pairs", "dpo"))
    config.model.path, config.data.path = "gpt2", "prompts.jsonl"
    config.pairs.update(prompts=100, completions=4, choose=choose)
    found = groups.group_of(config, "dpo", Assumptions())
    assert (found.pairs, found.responses) == (pairs, responses)
    assert planner.examples_and_steps(config, "dpo", Assumptions())[0] == 100 * pairs


def test_group_of_config():
    config = scratch_config()
    assert groups.group_of(config, "dpo", Assumptions()) == Group(16, 16, 1, 2)
    lengths = Assumptions(prompt_tokens=20, response_tokens=5)
    assert groups.group_of(config, "dpo", lengths) == Group(20, 5)
    with pytest.raises(
        ValueError, match="make 33, but examples are cut to config.data.max_length = 32"
    ):
        groups.group_of(config, "dpo", Assumptions(prompt_tokens=20, response_tokens=13))
    for assumed, pairs, responses in (
        (Assumptions(pairs_per_prompt=4), 4, 4),
        (Assumptions(responses_per_prompt=4), 6, 4),
        (Assumptions(pairs_per_prompt=4, responses_per_prompt=5), 4, 5),
    ):
        assert groups.group_of(config, "dpo", assumed) == Group(16, 16, pairs, responses)


def test_group_of_sampled_pairs():
    """A run that samples its pairs says how many there are. Texts of its sft stage stand alone."""
    config = configs.default(("sft", "pairs", "dpo"))
    config.sampling.update(max_prefix=8, max_new_tokens=60)
    assert groups.group_of(config, "dpo", Assumptions()) == IMDB
    config.pairs.completions = 3
    assert groups.group_of(config, "dpo", Assumptions()) == Group(8, 60, 3, 3)
    assert groups.group_of(config, "dpo", Assumptions(pairs_per_prompt=1)) == Group(8, 60, 1, 2)
    assert groups.group_of(config, "sft", Assumptions()).pairs == 1
    # So do chosen responses from a file; those of the run's own pairs were sampled together.
    from_file = configs.default(("preferred_ft",))
    assert groups.group_of(from_file, "preferred_ft", Assumptions()).pairs == 1
    for assumed in (Assumptions(pairs_per_prompt=6), Assumptions(responses_per_prompt=4)):
        for single, stage in ((config, "sft"), (from_file, "preferred_ft")):
            with pytest.raises(ValueError, match=f"nothing about the stage {stage}, which trains"):
                groups.group_of(single, stage, assumed)
    sampled = configs.default(("sft", "pairs", "preferred_ft"))
    assert groups.group_of(sampled, "preferred_ft", Assumptions()).pairs == 6


def tokens(group, **changes):
    """Return the tokens that a step of 12 pairs reads."""
    config = scratch_config(**dict(batch_size=12, data__order="prompts") | changes)
    batches = groups.lay_out(config, "dpo", group, shards=1)
    reading = batches.reading()
    pair_tokens = group.prompt_tokens + 2 * group.response_tokens
    assert reading.tokens_one_at_a_time == 12 * len(batches) * pair_tokens
    return reading.tokens / len(batches)


def test_layout_follows_order_of_data():
    assert tokens(IMDB) == 2 * (8 + 4 * 60)
    assert tokens(TLDR) == 3 * (512 + 5 * 128)
    assert tokens(IMDB, data__order="pairs") == 12 * (8 + 2 * 60)
    # Two halves of a prompt's pairs, which are 0-1 0-2 0-3 and 1-2 1-3 2-3, are far apart.
    assert tokens(IMDB, data__group_pairs=3) == 2 * (8 + 4 * 60) + 2 * (8 + 3 * 60)
    # As in the file.
    assert tokens(IMDB, data__order="pairs", data__shuffle=False) == tokens(IMDB)
    # 5 batches hold 12 prompts, and the end of 4 batches cuts one, which is then read twice.
    five = Group(8, 60, pairs=5, responses=10)
    assert tokens(five) == (12 * (8 + 10 * 60) + 4 * 8) / 5


def test_layout_of_one_response():
    """Preferred-FT reads the chosen response of each pair: 0 0 0 1 1 2."""
    config = configs.default(("sft", "pairs", "preferred_ft"))
    config.data.order = "prompts"
    config.preferred_ft.batch_size = 12
    batches = groups.lay_out(config, "preferred_ft", IMDB, shards=1)
    expected = Reading(examples=12, tokens=2 * (8 + 3 * 60), tokens_one_at_a_time=12 * (8 + 60))
    assert batches.reading() == expected
    # Each once, 0 1 2: a batch of 12 has four prompts.
    config.preferred_ft.distinct = True
    batches = groups.lay_out(config, "preferred_ft", IMDB, shards=1)
    expected = Reading(examples=12, tokens=4 * (8 + 3 * 60), tokens_one_at_a_time=12 * (8 + 60))
    assert batches.reading() == expected
    assert groups.pairs_together(config, "preferred_ft", IMDB) == 3


def test_layout_of_unpaired_rows():
    """KTO reads both responses of each pair, and every prompt with another row's completion."""
    config = configs.default(("sft", "pairs", "kto"))
    config.kto.batch_size = 24
    assert len(groups.examples_of(config, "kto", IMDB)) == 2 * IMDB.pairs
    batches = groups.lay_out(config, "kto", IMDB, shards=1)
    # Two prompts of four responses, each in three pairs; the other prompt's four are as many.
    assert batches.reading().tokens == 2 * (8 + 4 * 60)
    assert batches.mismatched.examples.own_prompts == 0
    assert batches[0].labels.all() and batches[0].mismatched.weights.sum() == 24
    steps = planner.examples_and_steps(config, "kto", planner.Assumptions())[0]
    assert steps == config.pairs.prompts * 12


def sharing(group, shards, **changes):
    config = scratch_config(**dict(data__order="prompts") | changes)
    model = planner.model_config(config, "dpo")
    batches = groups.lay_out(config, "dpo", group, shards)
    return groups.sharing(config, "dpo", model, group, batches)


def test_sharing_on_a_mesh():
    """64 pairs on 64 chips share nothing, 384 do."""
    lost = sharing(IMDB, 64, batch_size=64)
    assert lost.tokens == lost.apart == 64 * (8 + 2 * 60)
    assert lost.whole < 0.4 * lost.tokens and lost.is_lost
    flags = [suggestion.flags for suggestion in lost.suggestions]
    assert flags == [
        "--config.dpo.batch_size=384",
        "--config.mesh.data=1 --config.mesh.fsdp=16 --config.mesh.tensor=4",
    ]

    whole = sharing(IMDB, 64, batch_size=384)
    assert whole.tokens == whole.whole == 64 * (8 + 4 * 60)
    assert not whole.suggestions and not whole.is_lost
    assert lost.suggestions[0].then == whole.computed / 384
    assert lost.suggestions[0].tokens_per_pair == lost.computed / 64


def test_sharing_over_microbatches():
    """Larger microbatches come first, as they change no update."""
    found = sharing(TLDR, 16, batch_size=64, microbatch_size=32)
    assert found.cells == 32 and found.is_lost
    assert found.suggestions[0].flags == "--config.dpo.microbatch_size=64"
    assert sharing(TLDR, 16, batch_size=64, microbatch_size=64).tokens == 16 * (512 + 5 * 128)


def test_sharing_in_uneven_cells():
    """8 pairs a cell hold a whole prompt of 6, but some hold two."""
    found = sharing(IMDB, 8, batch_size=64)
    assert found.tokens == found.whole and not found.is_lost
    assert found.computed > 1.2 * found.tokens
    assert found.suggestions[0].flags == "--config.dpo.batch_size=96"


@pytest.mark.parametrize("order", ["prompts", "pairs"])
def test_nothing_to_suggest(order):
    found = sharing(Group(16, 16), 8, batch_size=8, data__order=order)
    assert not found.suggestions and found.tokens == found.apart == found.whole


def test_order_by_prompts_is_suggested_first():
    """Other sizes then come on top of it."""
    found = sharing(IMDB, 8, batch_size=64, data__order="pairs")
    assert found.tokens == found.apart == found.whole
    in_order = sharing(IMDB, 8, batch_size=64)
    first, second, *_ = found.suggestions
    assert first.flags == "--config.data.order=prompts"
    assert first.tokens == in_order.tokens < 0.4 * found.tokens
    assert first.then == in_order.computed / 64 < first.tokens_per_pair == found.computed / 64
    assert second.flags == "--config.data.order=prompts --config.dpo.batch_size=96"
    assert second.tokens == sharing(IMDB, 8, batch_size=96).tokens

    # With a pair a cell, whole prompts need a larger batch as well.
    found = sharing(IMDB, 8, batch_size=8, data__order="pairs")
    assert found.suggestions[0].flags == "--config.data.order=prompts --config.dpo.batch_size=48"
    # The order of the file is not shuffled, whatever data.order says.
    assert not sharing(IMDB, 1, batch_size=12, data__order="pairs", data__shuffle=False).suggestions


def test_plan_needs_flops_of_what_is_read():
    """Two prompts of 16 tokens with 6 pairs of 4 responses of 16."""
    config = scratch_config(batch_size=12, data__order="prompts")
    six = Assumptions(pairs_per_prompt=6)
    report = planner.plan(config, topologies.parse("h200:1"), "dpo", six)
    contents = Contents(
        tokens=2 * (16 + 4 * 16),
        completion_tokens=2 * 4 * 16,
        prompt=np.full(2, 16),
        context=np.full(8, 16),
        response=np.full(8, 16),
    )
    model = planner.model_config(config, "dpo")
    assert report.needed_flops_per_step == flops.of_step(model, contents, reference=True)
    assert report.sharing.computed == report.sharing.tokens == contents.tokens
    # No padding: what is not needed is above the diagonal of attention, and sums over tokens.
    assert 1 < report.flops_per_step / report.needed_flops_per_step < 1.15


def test_report_says_what_is_lost():
    config = scratch_config(batch_size=8, data__order="prompts")
    six = Assumptions(pairs_per_prompt=6)
    report = planner.plan(config, topologies.parse("h200:8"), "dpo", six)
    text = report_lib.table(report)
    assert "6 pairs of 4 responses a prompt" in text
    read = f"{report.sharing.tokens:.0f}"
    assert f"reads {read} tokens a step; one pair at a time 384\n" in text
    assert "each of 8 cells (shard x microbatch) has room for 1 pair, but 6" in text
    assert "sharing is lost" in text and "--config.dpo.batch_size=48" in text
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()

    config.data.order = "pairs"
    text = report_lib.table(planner.plan(config, topologies.parse("h200:8"), "dpo", six))
    assert "the pairs of a prompt are shuffled apart, so they share nothing" in text
    assert "lost" not in text and "cells" not in text
    assert "  --config.data.order=prompts --config.dpo.batch_size=48  (reads " in text

    config.data.update(order="prompts", group_pairs=4)
    text = report_lib.table(planner.plan(config, topologies.parse("h200:8"), "dpo", six))
    assert "no more than 4 pairs of a prompt stay together (config.data.group_pairs)" in text


def test_report_of_single_completions_speaks_of_rows():
    config = configs.default(("sft", "pairs", "preferred_ft"))
    config.model.scratch.update(SCRATCH)
    config.data.path = "PAIRS"
    config.data.order = "prompts"
    config.sampling.update(max_prefix=8, max_new_tokens=60)
    config.preferred_ft.batch_size = 12
    text = report_lib.table(planner.plan(config, topologies.parse("h200:1"), "sft"))
    assert "1 response a prompt" in text and "one row at a time" in text and "pair" not in text
    text = report_lib.table(planner.plan(config, topologies.parse("h200:1"), "preferred_ft"))
    assert "6 rows of single responses a prompt" in text and "pair" not in text


def test_plan_reads_what_the_run_reads(tmp_path, monkeypatch, capsys):
    """Twelve prompts with 6 pairs of 4 responses, on two devices."""
    rows = []
    for number in range(12):
        prompt = f"w{number} w1 w2"
        texts = [f"w{number} w{response} w3 w4" for response in range(4)]
        for chosen, rejected in itertools.combinations(texts, 2):
            rows.append(dict(prompt=prompt, chosen=chosen, rejected=rejected))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = dpo_config(
        write_model(tmp_path / "model"), tmp_path / "pairs.jsonl", data__order="prompts"
    )
    read = {}
    lengths = set()

    def record(self, step):
        read[step] = self._batches.tokens(step)
        prompt_P, response_PK, _ = self._data.train.lengths()
        lengths.update(zip(prompt_P.tolist(), response_PK[:, 0].tolist(), strict=True))
        return read[step]

    monkeypatch.setattr(DataFeed, "tokens", record)
    with on_devices(2):
        run(config, tmp_path / "run")
    [(prompt_tokens, response_tokens)] = lengths
    assumed = Assumptions(prompt_tokens, response_tokens, pairs_per_prompt=6)
    report = planner.plan(config, topologies.parse("h200:2"), "dpo", assumed)
    assert report.sharing.cells == 2 and len(read) == 6
    assert report.sharing.tokens == np.mean(list(read.values())) < report.sharing.apart
    # Four rows of each cell cut prompts of six.
    assert report.sharing.is_lost
    assert "of a step (microbatches x data shards) have 4 rows each" in capsys.readouterr().out
