"""Rewards: prompts and completions to numbers, behind one interface.

A reward is a function (prompts, completions, tokens, conversations=None) -> float64 [n]. All are
lists of n: the texts, (prompt, completion) as the policy's ids, and each prompt's messages
(`sampling.prompts.Conversation`), None where it is plain text. tokens is None where the completions
are not a policy's samples, and conversations where no prompt is one.

`make_reward` makes those that a config names, `from_function` one of your own.
"""

import datetime
import functools
from collections.abc import Callable

import numpy as np

from dpo_jax.data import toy
from dpo_jax.models import hf, loading, safetensors_io
from dpo_jax.rewards import classifier, reward_model, sequence_classifier


def make_reward(
    kind: str,
    path: str,
    batch_size: int,
    mesh,
    on_long: str = "error",
    date: datetime.date | None = None,
) -> Callable:
    """Return a reward by config.reward.kind, or "rm" for the rm stage's model.

    on_long: config.reward.on_long. date: what chat templates take for today; None: today. A reward
    is made once in a process. Raises FileNotFoundError or ValueError where the path holds no such
    reward.
    """
    if kind == "model" and not _is_own(path):
        return sequence_classifier.of_texts(path, batch_size, mesh, on_long, date)
    if kind == "model" and on_long != "error":
        raise ValueError(
            f"config.reward.on_long={on_long!r}: expected 'error', as {path} was trained with "
            "dpo_jax, and reads the tokens that the policy sampled, which are not cut."
        )
    return _made(kind, path, batch_size, mesh)


@functools.cache
def _is_own(path: str) -> bool:
    """Return whether dpo_jax exported the reward model at a path."""
    return loading.is_own(*loading.find(path))


@functools.cache
def _made(kind: str, path: str, batch_size: int, mesh) -> Callable:
    """Return a reward that depends on nothing else."""
    if kind in toy.REWARDS:
        return _toy(kind)
    if kind == "classifier":
        return _of_text(classifier.classifier(hf.fetch(path), batch_size, mesh))
    if kind == "ngram":
        from dpo_jax.rewards import ngram  # needs scikit-learn, which takes a second to import

        return _of_text(ngram.fitted(path))
    if kind == "model":
        return reward_model.any_policy(path, batch_size, mesh)
    if kind == "rm":
        return reward_model.same_policy(path, batch_size, mesh)
    raise ValueError(f"there is no reward of kind {kind!r}.")


def from_function(function: Callable) -> Callable:
    """Return the reward that a function from prompts and completions to numbers gives.

    function: (prompts, completions), two lists of n texts -> n numbers. Raises ValueError when it
    returns anything else, or a number that is not finite.
    """
    name = getattr(function, "__name__", repr(function))

    def reward(prompts, completions, _tokens, _conversations=None) -> np.ndarray:
        rewards = np.asarray(function(list(prompts), list(completions)), np.float64)
        if rewards.shape != (len(prompts),):
            raise ValueError(
                f"the reward function {name} returned an array of shape {rewards.shape} for "
                f"{len(prompts)} completions: expected a number for each of them."
            )
        wrong = np.flatnonzero(~np.isfinite(rewards))
        if len(wrong):
            first = int(wrong[0])
            raise ValueError(
                f"the reward function {name} returned {rewards[first]} for the completion "
                f"{completions[first]!r} of the prompt {prompts[first]!r}: expected a finite "
                "number."
            )
        return rewards

    return reward


def check_reward(kind: str, path: str) -> None:
    """Fetch what a reward reads, before hours go into the stages that come first.

    Raises FileNotFoundError where there is none, and ValueError for a model that gives no reward.
    """
    if kind == "classifier":
        safetensors_io.files(hf.fetch(path))
    if kind == "model":
        folder, _ = loading.find(path)  # the base's, where the path is an adapter's
        safetensors_io.files(folder)
        if not _is_own(path):
            sequence_classifier.check(path)


def _of_text(positive: Callable) -> Callable:
    """Return the probability that prompt + completion, as one text, is positive."""

    def reward(prompts, completions, _tokens, _conversations=None) -> np.ndarray:
        texts = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        return positive(texts)

    return reward


def _toy(kind: str) -> Callable:
    """Return one of the toy's rules, on its words."""
    words = list(toy.WORDS)

    def reward(prompts, completions, _tokens, _conversations=None) -> np.ndarray:
        if not prompts:
            return np.zeros(0)
        # The rule takes every prompt with every completion: each prompt is given once.
        prompts_P, which_B = np.unique(prompts, return_inverse=True)
        ids_P = np.array([words.index(prompt.strip()) for prompt in prompts_P])
        ids = []
        for text in completions:
            ids.append([words.index(word) for word in text.split()])
        ids_BT = np.array(ids)
        rewards_PB = toy.REWARDS[kind](ids_P, ids_BT)
        return rewards_PB[which_B, np.arange(len(ids_BT))].astype(np.float64)

    return reward
