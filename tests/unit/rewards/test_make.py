"""Rewards behind one interface: values, order, neighbours, empty lists."""

import json

import jax
import numpy as np
import pytest

from dpo_jax.data import packing
from dpo_jax.data.batches import Batches
from dpo_jax.data.examples import Examples
from dpo_jax.models import hf, inference, loading
from dpo_jax.parallel import sharding
from dpo_jax.rewards import make, ngram
from dpo_jax.rewards import reward_model as reward_model_lib
from tests.helpers.tiny_runs import tokenizer

WORDS = [f"w{i}" for i in range(50)]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


def random_texts(count, longest, seed):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest + 1))) for _ in range(count)]


def test_toy_reward_by_hand(mesh):
    """Half the sum of wonderful 2, good 1, bad -1, terrible -2, each negated after "not", a prompt
    too.
    """
    prompts = ["plot", "not", "bad", "film"]
    completions = [
        " bad bad terrible plot plot",
        " good good bad not bad",
        " not terrible film film wonderful",
        " not good not wonderful film",
    ]
    found = make.make_reward("toy", "", 8, mesh)(prompts, completions, None)
    assert found.dtype == np.float64 and found.tolist() == [-2.0, 0.0, 2.0, -1.5]
    saturating = make.make_reward("toy_saturating", "", 8, mesh)(prompts, completions, None)
    np.testing.assert_allclose(saturating, 3 * np.tanh(1.2 * found))


@pytest.mark.parametrize("kind", ["toy", "toy_saturating"])
def test_toy_reward_of_no_texts(mesh, kind):
    assert make.make_reward(kind, "", 8, mesh)([], [], []).shape == (0,)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A reward model of 12 learned positions and the tests' words, after an EOS and a word."""
    folder = tmp_path_factory.mktemp("rewards") / "model"
    model = loading.from_scratch(
        dict(
            model_type="gpt2",
            vocab_size=40,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=12,
            bos_token_id=0,
            eos_token_id=1,
        ),
        0,
        head="reward",
    )
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape),
        model.load_params(sharding.make_mesh()),
    )
    hf.save(folder, model.config, model.hf_config, params, tokenizer())
    return str(folder)


def scores(mesh, folder, *rows):
    """By the model's own program, one row at a time."""
    return np.concatenate(
        [make.make_reward("rm", folder, 8, mesh)(None, None, [row]) for row in rows]
    )


def test_reward_model_reads_own_tokens(mesh, reward_model):
    """With EOS where the policy ended, and without where it did not; an empty completion too."""
    tokens = [
        (np.array(prompt), np.array(completion))
        for prompt, completion in (([0, 5, 6], [7, 8, 1]), ([0, 9], [10]), ([0], [1]))
    ]
    found = make.make_reward("model", reward_model, 8, mesh)(
        ["w2 w3", "w6", ""], [" w4 w5", " w7", ""], tokens
    )
    np.testing.assert_allclose(found, scores(mesh, reward_model, *tokens), rtol=1e-6)


def test_progress_is_shown_of_many_rewards(mesh, reward_model, monkeypatch, capsys):
    """Of as many as best of N asks for, and not of a step of PPO."""
    monkeypatch.setattr(reward_model_lib, "SHOWN_BATCHES", 1)
    reward = make.make_reward("model", reward_model, 8, mesh)
    one = (np.array([0, 5]), np.array([7, 1]))
    for count in (8, 17):
        reward(["w2"] * count, [" w4"] * count, [one] * count)
        lines = capsys.readouterr().out.splitlines()
        assert any("reward model 3/3" in line for line in lines) == (count == 17)


@pytest.mark.parametrize("devices", [1, 4])
def test_completions_of_a_prompt_read_it_once(reward_model, monkeypatch, devices):
    """Four of each; one prompt comes twice, with another between."""
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 40, length).astype(np.int32) for length in (6, 1, 3, 6, 4)]
    prompts.insert(3, prompts[0])
    tokens = []
    for prompt in prompts:
        for _ in range(4):
            tokens.append((prompt, rng.integers(2, 40, rng.integers(1, 7)).astype(np.int32)))
    tokens[1] = tokens[0]  # two that are equal
    batches = []
    make_batches = inference.Batches

    def recorded(*args, **options):
        batches.append(make_batches(*args, **options))
        return batches[-1]

    monkeypatch.setattr(inference, "Batches", recorded)
    reward = reward_model_lib.same_policy(reward_model, 16, mesh)
    found = reward(None, None, tokens)
    alone = np.concatenate([reward(None, None, [one]) for one in tokens])
    np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-6)
    assert np.ptp(found) > 0.01 and found[0] == found[1]
    together = batches[0].reading()
    assert together.examples == 24
    # The prompt that comes twice is read once, as are completions that are equal.
    distinct = sum(len(prompt) for prompt in prompts) - len(prompts[0])
    read = sum(len(completion) for _, completion in tokens) - len(tokens[0][1])
    if devices == 1:
        assert together.tokens == distinct + read
    else:  # devices have prompts in common, so that they have equally much to do
        assert distinct + read <= together.tokens < 0.9 * together.tokens_one_at_a_time
    # Texts of other lengths need no other program.
    compiled = reward_model_lib._rewards._cache_size()
    others = [(prompt[:2], completion[:3]) for prompt, completion in tokens]
    np.testing.assert_allclose(
        reward(None, None, others),
        np.concatenate([reward(None, None, [one]) for one in others]),
        rtol=1e-5,
        atol=1e-6,
    )
    assert reward_model_lib._rewards._cache_size() == compiled


@pytest.mark.parametrize("in_parts", [False, True])
def test_unequal_numbers_of_completions(mesh, reward_model, monkeypatch, in_parts):
    """Four of one prompt, one of another and three of a third, in turn."""
    monkeypatch.setattr(reward_model_lib, "LENGTHS", 2)
    # Rows of texts as short as these are whole, unless parts are taken at any price.
    monkeypatch.setattr(packing, "WORTH_IT", 10 if in_parts else 0)
    lengths = (9, 4, 7)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 40, length).astype(np.int32) for length in lengths]
    tokens = []
    for number in (0, 1, 2, 0, 2, 2, 0, 0):
        completion = np.append(len(tokens) + 2, rng.integers(2, 40, len(tokens) % 3))
        tokens.append((prompts[number], completion.astype(np.int32)))
    recorded = []
    make_batches = inference.Batches

    def record(*args, **options):
        recorded.append(make_batches(*args, **options))
        return recorded[-1]

    monkeypatch.setattr(inference, "Batches", record)
    one_device = sharding.make_mesh(devices=jax.devices()[:1])
    found = reward_model_lib.same_policy(reward_model, 8, one_device)(None, None, tokens)
    np.testing.assert_allclose(found, scores(mesh, reward_model, *tokens), rtol=1e-6, atol=1e-6)
    batches = recorded[1]
    assert len(batches) == 1
    assert batches.tokens(0) == sum(lengths) + sum(len(completion) for _, completion in tokens)
    (shape,) = batches.shapes
    assert shape.tokens == 3 * 10 + 8 * 4
    assert (shape.responses_per_row > 0) == in_parts


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("prompt_tokens", [8, 200])
def test_shape_holds_completions_of_any_prompts(window, prompt_tokens):
    rng = np.random.default_rng(0)
    # The number of each completion's prompt.
    owners = [np.zeros(80, int), np.arange(80), np.repeat(np.arange(4), 20), np.arange(80) % 7]
    owners += [np.sort(rng.integers(0, rng.integers(1, 80), 80)) for _ in range(30)]
    owners += [np.maximum(np.arange(80) - 76, 0), np.arange(80) // 27]
    shapes = set()
    for owner in owners:
        examples = Examples()
        for number, prompt in enumerate(owner):
            examples.append([prompt] * prompt_tokens, ([number] * 32,), "here")
        longest = reward_model_lib._Longest.of(examples)
        prompts = len(set(owner.tolist()))
        shape = reward_model_lib._shape_of_any(longest, prompts, 80, window)
        # It raises where the batch does not fit.
        batches = Batches(examples, np.arange(80)[None], shape=shape)
        assert batches[0].weights.sum() == 80
        shapes.add(shape)
    # Of at most 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64 and 80 prompts.
    assert 5 <= len(shapes) <= 13
    in_parts = [shape for shape in shapes if shape.responses_per_row]
    assert bool(in_parts) == (window is None)
    # Where nothing is shared, rows are whole.
    assert all(shape.responses_per_row > 1 for shape in in_parts)


def test_reward_model_with_other_tokenizer(mesh, reward_model, capsys):
    others = [(np.array([30]), np.array([31])), (np.array([], int), np.array([32]))]
    found = make.make_reward("model", reward_model, 8, mesh)(["w2 w3", ""], ["w4 w5", "w6"], others)
    wanted = scores(
        mesh,
        reward_model,
        (np.array([0, 5, 6]), np.array([7, 8, 1])),
        (np.array([0]), np.array([9, 1])),
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert "has another tokenizer than the policy" in capsys.readouterr().out


def test_reward_model_reads_texts_alone(mesh, reward_model):
    """As a judge's; and the same words by a policy that ends in another special token."""
    wanted = scores(mesh, reward_model, (np.array([0, 5, 6]), np.array([7, 8, 1])))
    for tokens in (None, [(np.array([0, 5, 6]), np.array([7, 8, 2]))]):
        found = make.make_reward("model", reward_model, 8, mesh)(["w2 w3"], [" w4 w5"], tokens)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert make.make_reward("model", reward_model, 8, mesh)([], [], None).shape == (0,)


def test_reward_model_refuses_long_text(mesh, reward_model):
    tokens = [(np.arange(2), np.arange(3)), (np.arange(4), np.arange(10))]
    with pytest.raises(
        ValueError, match="completion 2 of those .* has 14 tokens, but the model has 12 positions"
    ):
        make.make_reward("rm", reward_model, 8, mesh)(None, None, tokens)


def test_ngram_reward_reads_one_text(mesh, tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        dict(
            text=f"{' '.join(rng.choice(WORDS, 4))} {'good' if label else 'bad'}ly",
            label=int(label),
        )
        for label in rng.random(200) < 0.5
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = make.make_reward("ngram", str(tmp_path), 8, mesh)
    found = reward(["w1 good", "w1 ", "w2 w3 bad", "w1 goodly"], ["ly", "goodly", "ly", ""], None)
    assert found[0] == found[1] == found[3] > 0.9 and found[2] < 0.1
    np.testing.assert_array_equal(
        found, ngram.fitted(str(tmp_path))(["w1 goodly", "w1 goodly", "w2 w3 badly", "w1 goodly"])
    )
    assert reward([], [], []).shape == (0,)
    assert make.make_reward("ngram", str(tmp_path), 8, mesh) is reward


def test_reward_needs_completion_per_prompt(mesh, tmp_path):
    (tmp_path / "train.jsonl").write_text(
        "".join(
            json.dumps(dict(text="good" if label else "bad", label=label)) + "\n"
            for label in [0, 1] * 10
        )
    )
    with pytest.raises(ValueError, match="zip"):
        make.make_reward("ngram", str(tmp_path), 8, mesh)(["one", "two"], ["one"], None)


def test_reward_from_function():
    reward = make.from_function(lambda prompts, completions: [len(text) for text in completions])
    found = reward(["a", "b"], [" one", ""], [(np.array([1]), np.array([2]))] * 2)
    assert found.dtype == np.float64 and found.tolist() == [4.0, 0.0]
    assert reward([], [], None).shape == (0,)


@pytest.mark.parametrize(
    "returned, message",
    [
        ([1.0], r"measure returned an array of shape \(1,\) for 2 completions"),
        (1.0, r"shape \(\) for 2 completions: expected a number for each"),
        ([0.0, np.nan], "returned nan for the completion 'y' of the prompt 'b'"),
    ],
)
def test_reward_from_function_refuses(returned, message):
    def measure(prompts, completions):
        return returned

    with pytest.raises(ValueError, match=message):
        make.from_function(measure)(["a", "b"], ["x", "y"], None)


def test_unknown_kind_of_reward(mesh):
    with pytest.raises(ValueError, match="no reward of kind 'taste'"):
        make.make_reward("taste", "", 8, mesh)
