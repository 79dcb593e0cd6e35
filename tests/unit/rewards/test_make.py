"""Rewards behind one interface: values, order, neighbours, empty lists."""

import json

import jax
import numpy as np
import pytest

from dpo_jax.models import hf, loading
from dpo_jax.parallel import sharding
from dpo_jax.rewards import make, ngram
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
