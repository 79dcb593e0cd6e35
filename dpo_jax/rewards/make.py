"""Rewards: prompts and completions to scores, behind one interface.

A reward is a callable (prompts, completions, tokens) -> float64 [n], all lists of n: the texts, and
(prompt, completion) as the policy's ids, which reward models read, or None where no policy of ours
made them.
"""

import functools
from collections.abc import Callable

import numpy as np

from dpo_jax.data import toy
from dpo_jax.models import hf, safetensors_io
from dpo_jax.rewards import classifier, reward_model


@functools.cache
def make_reward(kind: str, path: str, batch_size: int, mesh) -> Callable:
    """A reward by config.reward.kind, or "rm" for the rm stage's model; made once in a process.

    Raises FileNotFoundError or ValueError where the path holds no such reward.
    """
    return KINDS[kind](path, batch_size, mesh)


def check_reward(kind: str, path: str) -> None:
    """Fetches what a reward will read, before hours go into the stages that come first;
    FileNotFoundError likewise.
    """
    if kind in ("classifier", "model"):
        safetensors_io.files(hf.fetch(path))


def _toy(kind: str) -> Callable:
    """One of the toy's rules, on its words."""
    words = list(toy.WORDS)

    def reward(prompts, completions, _tokens):
        if not prompts:
            return np.zeros(0)
        prompts_P, which_B = np.unique(prompts, return_inverse=True)
        ids_P = np.array([words.index(prompt.strip()) for prompt in prompts_P])
        ids_BT = np.array([[words.index(word) for word in text.split()] for text in completions])
        return toy.REWARDS[kind](ids_P, ids_BT)[which_B, np.arange(len(ids_BT))].astype(np.float64)

    return reward


def _classifier(path, batch_size, mesh) -> Callable:
    """The probability that prompt + completion is positive, by a sentiment classifier of Hugging
    Face.
    """
    positive = classifier.classifier(hf.fetch(path), batch_size, mesh)
    return lambda prompts, completions, _tokens: positive(_joined(prompts, completions))


def _ngram(path, _batch_size, _mesh) -> Callable:
    """The probability that prompt + completion is positive, by an n-gram model fitted to labelled
    texts.
    """
    from dpo_jax.rewards import ngram  # needs scikit-learn, which takes a second to import

    positive = ngram.fitted(path)
    return lambda prompts, completions, _tokens: positive(_joined(prompts, completions))


def _joined(prompts, completions) -> list[str]:
    return [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]


KINDS = {
    "classifier": _classifier,
    "ngram": _ngram,
    "model": reward_model.any_policy,
    "rm": reward_model.same_policy,
    **{kind: lambda _path, _batch_size, _mesh, kind=kind: _toy(kind) for kind in toy.REWARDS},
}
