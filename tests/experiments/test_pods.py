"""The plans for pods: the plain DPO that they are compared with, and their tables."""

import collections
import json

import jax
import numpy as np
import pytest

from dpo_jax.data.batches import Batches, training_order
from dpo_jax.training import objectives
from experiments import pods
from tests.helpers.tiny import random_pairs

HYPER = dict(beta=0.3, label_smoothing=0.0)


def test_plain_dpo_equals_ours(tiny):
    """Padded rows with all logits give the flat batch's loss and gradient: the plans differ in how,
    not in what.
    """
    config, params = tiny
    params = jax.tree.map(lambda x: x / 2, params)
    reference = jax.tree.map(lambda x: x * 1.05, params)
    pairs = random_pairs(4, longest=8)
    plain, batch = pods.padded_rows(config, None, pairs=4, microbatches=1, length=24)
    for row, (prompt, response) in enumerate(
        (pair.prompt, response) for pair in pairs for response in pair.responses
    ):
        text = np.concatenate([prompt, response])
        batch["tokens"][0, row, : len(text)] = text
        batch["completion_mask"][0, row, len(prompt) : len(text)] = 1
    ours = objectives.make("dpo", config, "sigmoid")
    flat = Batches(pairs, training_order(4, 4, 1, None))[0]
    found = [
        jax.jit(
            jax.value_and_grad(
                lambda params, objective=objective, part=part: objective(
                    params, reference, HYPER, jax.tree.map(lambda x: x[0], part)
                )[0][0]
            )
        )(params)
        for objective, part in ((plain, batch), (ours, flat))
    ]
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-5)
    largest = max(float(abs(g).max()) for g in jax.tree.leaves(found[1][1]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * largest), found[0][1], found[1][1]
    )


def test_commands_tell_groups():
    """The plan command of a run with groups says what the prompts are taken to have."""
    tldr = pods.GROUPS["gpt-j-6b tl;dr, ours, 4 pairs a prompt"].command(plain=False)
    assert tldr.endswith("--pairs_per_prompt=4 --responses_per_prompt=5")
    assert "--config.data.order=prompts" in tldr
    imdb = pods.GROUPS["gpt2-large imdb, 384 pairs on 64"].command(plain=False)
    assert "--pairs_per_prompt" not in imdb  # the config says it
    assert "--config.dpo.batch_size=384" in imdb


def test_gpu_plans_are_in_the_table():
    """Every run is planned on 1, 8 and 32 GPUs, but for one whose state only 32 can hold."""
    plans = pods.gpu_plans()
    counts = collections.Counter(pod.topology for pod in plans.values())
    assert counts == {"h100:1": len(pods.ON_GPUS), "h100:8": 5, "h100:4x8": 7}
    made = [json.loads(line) for line in pods.OUT.read_text().splitlines()]
    commands = {row["name"]: row["command"] for row in made}
    for name, (pod, plain) in pods.all_plans().items():
        assert commands[name] == pod.command(plain), "plan it anew: python -m experiments.pods"


def test_page_has_the_tables():
    made = [json.loads(line) for line in pods.OUT.read_text().splitlines()]
    rows = {row["name"]: row for row in made}
    assert all(row["compiled"] for row in made)
    page = pods.OUT.with_suffix(".md").read_text()
    named = []
    for names in pods.sections().values():
        assert pods.markdown([rows[name] for name in names]) in page
        named += names
    assert sorted(named) == sorted(rows)


def test_tables_say_what_fits():
    sent = {"all-gather": dict(count=3, gib=1.25)}
    fits = dict(
        name="small",
        topology="v5e:2x2",
        compiled=True,
        mesh=dict(data=1, fsdp=2, tensor=2),
        batch_size=64,
        sharing=dict(tokens=81920.0),
        hbm_gib_per_chip=4.04,
        capacity_gib=15.75,
        fits=True,
        step_seconds=0.5,
        step_seconds_without_overlap=0.9,
        chip_hours=1.26,
        seconds=dict(compute=0.5, memory=0.3, interconnect=0.1),
        bottleneck="compute",
        collectives=sent,
    )
    not_so = fits | dict(name="large", compiled=False, fits=False, seconds=None, collectives=None)
    takes, limits = (
        table.splitlines()[2:] for table in pods.markdown([fits, not_so]).split("\n\n")
    )
    assert takes == [
        "| small | compiler | v5e:2x2 | fsdp 2 x tensor 2 | 64 | 81,920 | 4.0 of 15.8 | 0.5 | 0.9 "
        "| products | 1.3 |",
        "| large | estimate | v5e:2x2 | fsdp 2 x tensor 2 | 64 | 81,920 | 4.0 of 15.8: no | - | - "
        "| - | - |",
    ]
    assert limits == [
        "| small | 0.5 | 0.3 | 0.1 | 1.2 | 0.0 | 0.0 | 0.0 | 0.0 |",
        "| large | - | - | - | 0.0 | 0.0 | 0.0 | 0.0 | 0.0 |",
    ]
