"""The toy language, so small that every quantity of DPO can be computed exactly.

Its 8 words are the model's whole vocabulary, and a completion is 5 of them, so the probabilities of
a prompt's 8^5 completions sum to 1. A prompt is the first word of a review. The corpus leans to the
negative; the reward asks for the positive.

Letters: P prompts, C completions (all 32,768 of them), T their words, V vocabulary.
"""

import numpy as np

# word -> its weight in the reward
WORDS = {
    "wonderful": 2,
    "good": 1,
    "terrible": -2,
    "bad": -1,
    "not": 0,
    "film": 0,
    "plot": 0,
    "acting": 0,
}
WEIGHTS_V = np.array(list(WORDS.values()))
# The factor that a word puts on the weight of the next one.
FLIPS_V = np.array([-1 if word == "not" else 1 for word in WORDS])
# prompt -> how negative the corpus is after it
GLOOM = {"film": 0.4, "plot": 0.5, "acting": 0.7, "bad": 0.4}
PROMPTS = np.array([list(WORDS).index(word) for word in GLOOM])
STICKINESS = 1.5  # how much likelier the corpus' next word has the sign of the one before
LENGTH = 5  # words of a completion
TRAIN_ROWS, EVAL_ROWS = 20_000, 256
SEEDS = {"train": 0, "eval": 1}


def tokenizer():
    """Return a transformers tokenizer whose 8 ids are the 8 words; any other word is an error."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def completions() -> np.ndarray:
    """Return all completions, ids [C, T], in the order of numbers whose digits are the ids."""
    return np.indices((len(WORDS),) * LENGTH).reshape(LENGTH, -1).T


def rewards(prompts_P, completions_CT) -> np.ndarray:
    """Return half the sum of a completion's weights, each negated after "not".

    [P, C], from -5 to 5.
    """
    first_PC = np.multiply.outer(FLIPS_V[prompts_P], WEIGHTS_V[completions_CT[:, 0]])
    later_C = (FLIPS_V[completions_CT[:, :-1]] * WEIGHTS_V[completions_CT[:, 1:]]).sum(axis=-1)
    return 0.5 * (first_PC + later_C)


def saturating_rewards(prompts_P, completions_CT) -> np.ndarray:
    """Return a reward that no sum over words gives: 3 tanh(1.2 reward), [P, C]."""
    return 3 * np.tanh(1.2 * rewards(prompts_P, completions_CT))


REWARDS = {"toy": rewards, "toy_saturating": saturating_rewards}  # by config.reward.kind


def corpus(seed: int, n: int) -> np.ndarray:
    """Return n reviews, a prompt and its completion each, ids [n, 1 + T].

    The first ones are the same whatever n is.
    """
    uniform = np.random.default_rng(seed).random((n, 1 + LENGTH))
    prompt = (uniform[:, 0] * len(PROMPTS)).astype(int)
    # The next word is the first whose cumulative probability passes a uniform number.
    cdf_PVV = _transitions().cumsum(axis=-1)[..., :-1]
    words = [PROMPTS[prompt]]
    for t in range(1, 1 + LENGTH):
        words.append((uniform[:, t, None] > cdf_PVV[prompt, words[-1]]).sum(axis=-1))
    return np.stack(words, axis=1)


def _transitions() -> np.ndarray:
    """Return the corpus' probability of each next word, by prompt and previous word, [P, V, V]."""
    sign_V = np.sign(WEIGHTS_V)
    sticky_VV = STICKINESS * (sign_V[:, None] == sign_V)
    odds_PVV = np.exp(sticky_VV - np.multiply.outer(list(GLOOM.values()), WEIGHTS_V)[:, None])
    return odds_PVV / odds_PVV.sum(axis=-1, keepdims=True)


def examples(data, kind: str) -> dict[str, list[tuple]]:
    """Return the corpus for SFT, {"train": [(prompt, responses, where), ...], "eval": [...]}.

    data.max_rows and data.max_eval_rows say how many, where they are not 0. Raises ValueError for
    any other kind than "sft".
    """
    if kind != "sft":
        raise ValueError(
            "data.source='toy' has no pairs of its own: the `pairs` stage samples them from the "
            "model that the `sft` stage made, so put both before `dpo` in config.stages."
        )
    sizes = {"train": data.max_rows or TRAIN_ROWS, "eval": data.max_eval_rows or EVAL_ROWS}
    splits = {}
    for split, size in sizes.items():
        splits[split] = []
        for number, ids in enumerate(corpus(SEEDS[split], size), 1):
            prompt, response = _text(ids[:1]), _response(ids[1:])
            splits[split].append((prompt, (response,), f"toy {split} row {number}"))
    return splits


def _response(ids) -> str:
    """Return the text that follows a prompt: it starts with a space."""
    return " " + _text(ids)


def _text(ids) -> str:
    words = list(WORDS)
    return " ".join(words[i] for i in ids)
