"""A language so small that every quantity of DPO can be computed exactly: 8 words, completions of 5.

The words are the model's whole vocabulary, so the probabilities of a prompt's 8^5 completions sum to 1. A
prompt is the first word of a review. The corpus leans to the negative; the reward asks for the positive.

Letters: P prompts, C completions (all 32,768 of them), T their words, V vocabulary.
"""

import itertools

import numpy as np

WORDS = {"wonderful": 2, "good": 1, "terrible": -2, "bad": -1, "not": 0, "film": 0, "plot": 0, "acting": 0}
WEIGHTS_V = np.array(list(WORDS.values()))
FLIPS_V = np.array([-1 if word == "not" else 1 for word in WORDS])  # a word's effect on the next one's weight
GLOOM = {"film": 0.4, "plot": 0.5, "acting": 0.7, "bad": 0.4}  # how negative the corpus is after each prompt
PROMPTS = np.array([list(WORDS).index(word) for word in GLOOM])
STICKINESS = 1.5  # how much likelier the corpus' next word has the sign of the one before
LENGTH = 5  # words of a completion
TRAIN_ROWS, EVAL_ROWS = 20_000, 256
SEEDS = {"train": 0, "eval": 1}
LABELS = {  # config.pairs.labels -> the probability that the first is preferred, from its margin in reward
    "bradley_terry": lambda margin: 1 / (1 + np.exp(-margin)),
    "deterministic": lambda margin: margin > 0,
}


def tokenizer():
    """A transformers tokenizer whose 8 ids are the 8 words; any other word is an error."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


def completions() -> np.ndarray:
    """All completions, ids [C, T], in the order of numbers whose digits are the ids."""
    return np.indices((len(WORDS),) * LENGTH).reshape(LENGTH, -1).T


def rewards(prompts_P, completions_CT) -> np.ndarray:
    """Half the sum of a completion's weights, each negated after "not": [P, C], from -5 to 5."""
    first_PC = np.multiply.outer(FLIPS_V[prompts_P], WEIGHTS_V[completions_CT[:, 0]])
    later_C = (FLIPS_V[completions_CT[:, :-1]] * WEIGHTS_V[completions_CT[:, 1:]]).sum(axis=-1)
    return 0.5 * (first_PC + later_C)


def corpus(seed: int, n: int) -> np.ndarray:
    """n reviews, a prompt and its completion, ids [n, 1 + T]; the first ones are the same whatever n is."""
    uniform = np.random.default_rng(seed).random((n, 1 + LENGTH))
    prompt = (uniform[:, 0] * len(PROMPTS)).astype(int)
    cdf_PVV = _transitions().cumsum(axis=-1)[..., :-1]
    words = [PROMPTS[prompt]]
    for t in range(1, 1 + LENGTH):
        words.append((uniform[:, t, None] > cdf_PVV[prompt, words[-1]]).sum(axis=-1))
    return np.stack(words, axis=1)


def _transitions() -> np.ndarray:
    """The corpus' probability of the next word after each prompt and previous word, [P, V, V]."""
    sign_V = np.sign(WEIGHTS_V)
    sticky_VV = STICKINESS * (sign_V[:, None] == sign_V)
    odds_PVV = np.exp(sticky_VV - np.multiply.outer(list(GLOOM.values()), WEIGHTS_V)[:, None])
    return odds_PVV / odds_PVV.sum(axis=-1, keepdims=True)


def rows(data, kind: str) -> dict[str, list]:
    """The corpus for SFT, {"train": [(prompt, responses, where), ...], "eval": [...]}.

    data.max_rows and data.max_eval_rows say how many, where they are not 0.
    """
    if kind != "sft":
        raise ValueError("data.source='toy' has no pairs of its own: the `pairs` stage samples them from the "
                         "model that the `sft` stage made, so put both before `dpo` in config.stages.")
    sizes = {"train": data.max_rows or TRAIN_ROWS, "eval": data.max_eval_rows or EVAL_ROWS}
    return {split: [(_text(ids[:1]), (_response(ids[1:]),), f"toy {split} row {number}")
                    for number, ids in enumerate(corpus(SEEDS[split], n), 1)]
            for split, n in sizes.items()}


def sample_pairs(logps_PC, seed: int, *, prompts=4000, completions=4,
                 labels="bradley_terry") -> tuple[list[dict], dict[str, int]]:
    """Labelled pairs of completions sampled from a model, and how many pairs were left out, by reason.

    logps_PC: the model's log-probability of each completion after each of PROMPTS. One of these is drawn
    `prompts` times, with `completions` after it, all of whose pairs are labelled (appendix C.1): the first is
    preferred with probability sigmoid(r1 - r2), or with "deterministic" labels where its reward is higher.
    A pair has the fields prompt, chosen, rejected, reward_chosen and reward_rejected.
    """
    rng = np.random.default_rng(seed)
    prompt, first, second = _draw_pairs(rng, np.exp(logps_PC), prompts, completions)
    ids_CT, reward_PC = _enumerate()
    margin = reward_PC[prompt, first] - reward_PC[prompt, second]
    first_wins = rng.random(len(margin)) < LABELS[labels](margin)
    equal = first == second
    tied = (margin == 0) & ~equal & (labels == "deterministic")
    kept = ~equal & ~tied
    chosen, rejected = np.where(first_wins, (first, second), (second, first))
    pairs = [dict(prompt=_text(PROMPTS[[p]]), chosen=_response(ids_CT[c]), rejected=_response(ids_CT[r]),
                  reward_chosen=float(reward_PC[p, c]), reward_rejected=float(reward_PC[p, r]))
             for p, c, r in zip(prompt[kept], chosen[kept], rejected[kept], strict=True)]
    return pairs, {"equal completions": int(equal.sum()), "equal rewards": int(tied.sum())}


def _draw_pairs(rng, probability_PC, prompts: int, completions: int) -> tuple[np.ndarray, ...]:
    """Indices of the prompt, the first and the second completion of every pair, one array each."""
    prompt = rng.integers(len(PROMPTS), size=prompts)
    drawn = np.zeros((prompts, completions), int)
    for p, probability_C in enumerate(probability_PC):
        share_C = probability_C / probability_C.sum()  # `choice` wants 1 to more digits
        drawn[prompt == p] = rng.choice(len(share_C), size=((prompt == p).sum(), completions), p=share_C)
    first, second = np.array(list(itertools.combinations(range(completions), 2))).T
    return prompt.repeat(len(first)), drawn[:, first].ravel(), drawn[:, second].ravel()


def _enumerate() -> tuple[np.ndarray, np.ndarray]:
    """All completions [C, T] and their rewards [P, C]."""
    ids_CT = completions()
    return ids_CT, rewards(PROMPTS, ids_CT)


def _response(ids) -> str:
    """The text that follows a prompt: it starts with a space."""
    return " " + _text(ids)


def _text(ids) -> str:
    words = list(WORDS)
    return " ".join(words[i] for i in ids)
