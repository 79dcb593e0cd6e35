"""A training step on any mesh equals the step on one device, for every objective and family."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dpo_jax.data.batches import Batches
from dpo_jax.data.examples import Example
from dpo_jax.data.packing import Batch, RolloutTargets, RowLimits
from dpo_jax.models import families
from dpo_jax.parallel import sharding
from dpo_jax.training import losses, objectives, optim, step
from tests.helpers.tiny import HYPER as STAGE_HYPER
from tests.helpers.tiny import first_responses, masked_pairs, random_pairs
from tests.helpers.tiny_models import hf_config, random_params

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2), (2, 4, 1)]  # data, fsdp, tensor
FAMILIES = ["gpt2", "gptj", "neox-parallel", "llama2", "qwen3", "mistral-window"]
HEADS = {"dpo": "lm", "sft": "lm", "rm": "reward", "ppo": "lm_value"}
WEIGHTED = "dpo with weights"  # WPO and LD-DPO at once
# Each objective and each family meets every mesh or most of them, without all 144 combinations.
# Most are slow: the others have each family once, and between them every mesh and objective.
QUICK = {
    "gpt2": "rm",
    "gptj": "dpo",
    "neox-parallel": "ppo",
    "llama2": "dpo",
    "qwen3": "dpo",
    "mistral-window": "sft",
}
CASES = []
for i, family in enumerate(FAMILIES):
    for j, name in enumerate(HEADS):
        case = (name, family, MESHES[(i + j) % len(MESHES)])
        is_quick = QUICK[family] == name
        CASES.append(case if is_quick else pytest.param(*case, marks=pytest.mark.slow))
HYPER = STAGE_HYPER | dict(max_grad_norm=np.float32(1e6), ld_alpha=np.float32(0.4))


def make_batch(
    name: str, shards: int, stripes: int, window: int | None, make_pairs=random_pairs
) -> Batch:
    examples, rng = make_pairs(16, vocab=96, longest=8), np.random.default_rng(0)
    if name in ("sft", "ppo"):
        examples = first_responses(examples)
    rollout = None
    if name == "ppo":
        drawn = {}
        for field in dataclasses.fields(RolloutTargets):
            lengths = [example.completion_lengths()[0] for example in examples]
            drawn[field.name] = [rng.normal(0, 0.3, n).astype(np.float32) for n in lengths]
        rollout = RolloutTargets(**drawn)
        # log 96 is about 4.5
        rollout.sampled_log_probs = [values - 4.5 for values in rollout.sampled_log_probs]
    order = np.arange(len(examples))[None]
    # Tokens of a rollout have values of their own, so their responses are laid down apart.
    share = rollout is None
    limits = RowLimits(window, stripes=stripes)
    return Batches(examples, order, shards=shards, share=share, limits=limits, rollout=rollout)[0]


def stepped(name: str, config, params, mesh, make_pairs=random_pairs) -> tuple[dict, dict]:
    """The update of the weights in a step of gradient descent, and the metrics."""
    optimizer = optim.make("sgd", 0.0)
    shardings = step.state_shardings(mesh, optimizer, params)
    choices, hyper = losses.PLAIN, HYPER
    if name == WEIGHTED:
        name, choices = "dpo", losses.Choices(weighting="wpo", is_length_desensitized=True)
        # The weights are near 0, and a small update would be rounded with what it is added to.
        hyper = HYPER | dict(lr=np.float32(10))
    objective = objectives.make(name, config, "sum" if name == "sft" else "sigmoid", choices)
    train_step = step.make_train_step(objective, optimizer, "constant", shardings)
    placed = jax.device_put(params, shardings.params)
    reference = jax.tree.map(lambda x: x * 1.05, placed) if name == "dpo" else None
    shards, stripes = sharding.batch_shards(mesh), mesh.shape["context"]
    made = make_batch(name, shards, stripes, config.narrowest_window, make_pairs)
    batch = sharding.shard_batch(mesh, made, axis=1)
    with jax.set_mesh(mesh):
        state, metrics = train_step(
            step.init_state(optimizer, placed, {}, shardings), reference, hyper, batch
        )
    return (
        jax.tree.map(lambda after, before: np.asarray(after) - before, state.params, params),
        {key: float(total) / float(count) for key, (total, count) in metrics.items()},
    )


@functools.cache
def of_one_device(name: str, family: str, make_pairs=random_pairs) -> tuple:
    config = dataclasses.replace(families.from_hf(hf_config(family)), head=HEADS.get(name, "lm"))
    params = random_params(config)
    return (
        config,
        params,
        *stepped(name, config, params, sharding.make_mesh(devices=jax.devices()[:1]), make_pairs),
    )


def check_on_mesh(name, family, sizes, make_pairs=random_pairs, context=1):
    config, params, expected, expected_metrics = of_one_device(name, family, make_pairs)
    mesh = sharding.make_mesh(*sizes, context=context)
    update, metrics = stepped(name, config, params, mesh, make_pairs)
    largest = max(abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert largest > 1e-4
    for path, leaf in jax.tree_util.tree_leaves_with_path(update):
        wanted = functools.reduce(lambda tree, key: tree[key.key], path, expected)
        np.testing.assert_allclose(
            leaf, wanted, atol=2e-5 * largest, err_msg=sharding.path_name(path)
        )
    assert metrics.keys() == expected_metrics.keys()
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=2e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name, family, sizes", CASES)
def test_train_step_is_equal_on_meshes(name, family, sizes):
    check_on_mesh(name, family, sizes)


def test_weighted_train_step_is_equal_on_meshes():
    """Squared probabilities are added up over parts of the vocabulary, too."""
    check_on_mesh(WEIGHTED, "gpt2", (2, 2, 2))


# Norms over split heads, and layers that differ; logits that are bent, of a split vocabulary; three
# kinds of layer in a row and a row cut short; parts of tensors and of heads; experts' split widths.
@pytest.mark.parametrize(
    "family, sizes",
    [
        ("olmo3", (2, 2, 2)),
        pytest.param("gemma2", (1, 2, 4), marks=pytest.mark.slow),
        pytest.param("gemma3", (4, 1, 2), marks=pytest.mark.slow),
        pytest.param("phi3", (1, 4, 2), marks=pytest.mark.slow),
        pytest.param("qwen3-moe", (2, 2, 2), marks=pytest.mark.slow),
        pytest.param("mixtral", (2, 2, 2), marks=pytest.mark.slow),
        pytest.param("olmo2", (1, 4, 2), marks=pytest.mark.slow),
        pytest.param("smollm3", (2, 1, 4), marks=pytest.mark.slow),
    ],
)
def test_train_step_of_patterns_is_equal_on_meshes(family, sizes):
    check_on_mesh("dpo", family, sizes)


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("dpo", (8, 1, 1)),
        pytest.param("sft", (2, 2, 2), marks=pytest.mark.slow),
        ("ppo", (2, 2, 2)),
    ],
)
def test_train_step_with_masks_is_equal_on_meshes(name, sizes):
    check_on_mesh(name, "llama2", sizes, make_pairs=masked_pairs)


def three_pairs(count, vocab, longest) -> list[Example]:
    return random_pairs(3, vocab=vocab, longest=longest)


@pytest.mark.parametrize("name", ["dpo", "sft", "ppo"])
def test_train_step_of_fewer_rows_than_devices_is_equal(name):
    """Devices without a row add nothing, and nothing that is not a number."""
    check_on_mesh(name, "llama2", (8, 1, 1), make_pairs=three_pairs)


def grouped_pairs(count, vocab, longest) -> list[Example]:
    """Return four pairs of five responses to each prompt, which attention takes in two parts."""
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(0, count, 4):
        prompt = rng.integers(0, vocab, 5 * longest + rng.integers(longest)).astype(np.int32)
        responses = []
        for _ in range(5):
            length = rng.integers(1, longest + 1)
            responses.append(rng.integers(0, vocab, length).astype(np.int32))
        for rejected in responses[1:]:
            examples.append(Example(prompt, (responses[0], rejected)))
    return examples


@pytest.mark.parametrize(
    "name, family, sizes",
    [
        pytest.param("dpo", "gpt2", (2, 2, 2), marks=pytest.mark.slow),
        ("dpo", "llama2", (1, 2, 4)),
        pytest.param("rm", "qwen3", (4, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_train_step_in_two_parts_is_equal_on_meshes(name, family, sizes):
    shards = sizes[0] * sizes[1]
    batch = make_batch(name, shards, 1, None, grouped_pairs)
    assert all(bucket.prompts.size for bucket in batch.rows)  # no whole rows
    check_on_mesh(name, family, sizes, make_pairs=grouped_pairs)


@pytest.mark.parametrize(
    "name, family, sizes, context, make_pairs",
    [
        pytest.param("dpo", "llama2", (1, 4, 1), 2, random_pairs, marks=pytest.mark.slow),
        ("dpo", "gpt2", (1, 1, 2), 4, grouped_pairs),
        pytest.param("rm", "qwen3", (1, 2, 2), 2, grouped_pairs, marks=pytest.mark.slow),
        ("ppo", "llama2", (1, 2, 1), 4, random_pairs),
        pytest.param("dpo", "olmo3", (1, 2, 2), 2, grouped_pairs, marks=pytest.mark.slow),
        pytest.param("dpo", "gemma2", (2, 1, 2), 2, random_pairs, marks=pytest.mark.slow),
        pytest.param("dpo", "qwen3-moe", (1, 2, 1), 4, random_pairs, marks=pytest.mark.slow),
        ("dpo", "mistral-window", (2, 1, 2), 2, random_pairs),
        pytest.param("sft", "neox-parallel", (2, 1, 1), 4, grouped_pairs, marks=pytest.mark.slow),
        pytest.param(WEIGHTED, "gptj", (1, 1, 4), 2, random_pairs, marks=pytest.mark.slow),
    ],
)
def test_train_step_with_context_is_equal(name, family, sizes, context, make_pairs, capfd):
    """Prompts shared and separate rows, and a window; no array is copied to every device."""
    check_on_mesh(name, family, sizes, make_pairs, context)
    assert "rematerialization" not in capfd.readouterr().err
