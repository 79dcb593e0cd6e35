"""Measure a policy's true reward and its KL to the reference, as in the paper's figure 2.

The sequence KL is estimated twice from the same samples: by the sum of the exact per-step KLs at
the sampled prefixes (the paper's footnote 3; the less noisy one), and by the sum of the sampled
tokens' log-ratios.

Letters: B completions, one per prompt; others as in transformer.py.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from dpo_jax.data import packing
from dpo_jax.data.examples import Example
from dpo_jax.evaluation import statistics
from dpo_jax.models.inference import limits_of, map_tokens
from dpo_jax.models.loading import Model
from dpo_jax.models.log_probs import token_kls
from dpo_jax.parallel import sharding
from dpo_jax.parallel.sharding import constrain
from dpo_jax.sampling import prompts as prompts_lib
from dpo_jax.sampling import sampler
from dpo_jax.sampling.prompts import Prompts
from dpo_jax.sampling.sampler import Sampling

GRAM = 3  # tokens of the n-grams whose repetition is measured


def evaluate(
    model: Model, reference, prompts: Prompts, reward: Callable, sampling: Sampling
) -> tuple[dict[str, float], list[dict]]:
    """Sample a completion of each prompt; return the measured values and a row per completion.

    reference: its weights. sampling: one completion per prompt, at temperature 1. The values are
    frontier/reward, /kl (exact per step) and /kl_sampled (log-ratios), each with its standard error
    (_se, clustered by prompt; without it where all rows have one prompt), and /length (tokens),
    /eos_rate and /repetition.
    """
    # sampling.n is 1.
    drawn = [completion for (completion,) in sampler.sample(model, prompts.ids, sampling)]
    tokens = [completion.tokens for completion in drawn]
    texts = prompts_lib.completion_texts(prompts, tokens, model.tokenizer)
    pairs = list(zip(prompts.ids, tokens, strict=True))
    kl_sampled, kl = sequence_kls(
        model, reference, pairs, sampling.max_new_tokens, sampling.batch_size
    )
    found = dict(
        reward=np.asarray(reward(prompts.texts, texts, pairs, prompts.conversations)),
        kl=kl,
        kl_sampled=kl_sampled,
        length=np.array([len(ids) for ids in tokens]),
        eos_rate=np.array([completion.ended for completion in drawn]),
        repetition=np.array([repetition(ids) for ids in tokens]),
    )
    values = {f"frontier/{name}": float(values_B.mean()) for name, values_B in found.items()}
    for name in ("reward", "kl", "kl_sampled"):
        error = statistics.standard_error(found[name], prompts.clusters)
        if error is not None:
            values[f"frontier/{name}_se"] = error
    rows = []
    for index, (prompt, text) in enumerate(zip(prompts.texts, texts, strict=True)):
        measured = dict(
            reward=float(found["reward"][index]),
            kl=float(found["kl"][index]),
            length=len(tokens[index]),
        )
        rows.append(dict(prompt=prompt, completion=text) | measured)
    return values, rows


def sequence_kls(
    model: Model, reference, pairs, max_new_tokens: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return each completion's summed log-ratio and its summed per-step KLs, nats [B] each.

    pairs: (prompt, completion) as ids. Arrays have room for completions of max_new_tokens, so that
    later samples need no new program.
    """
    batch_size = sharding.whole_shards(min(batch_size, len(pairs)), model.mesh)
    # A made-up batch of the longest sequences gives the shape.
    longest_prompt = np.zeros(max(len(prompt) for prompt, _ in pairs), np.int32)
    longest = Example(longest_prompt, (np.zeros(max_new_tokens, np.int32),))
    examples_per_shard = batch_size // sharding.batch_shards(model.mesh)
    log_ratios, kls = map_tokens(
        functools.partial(_token_kls, model.config, model.params, reference),
        [Example(prompt, (tokens,)) for prompt, tokens in pairs],
        model.mesh,
        batch_size=batch_size,
        # Prompts have one completion each, so there is nothing to share.
        shape=packing.shape_of(
            [longest] * examples_per_shard,
            share=False,
            limits=limits_of(model.config, model.mesh),
        ),
    )
    # Float64: hundreds of small terms of either sign.
    log_ratio_B = np.array([values.sum(dtype=np.float64) for values in log_ratios])
    kl_B = np.array([values.sum(dtype=np.float64) for values in kls])
    return log_ratio_B, kl_B


@functools.partial(jax.jit, static_argnums=0)
def _token_kls(config, params, reference, batch):
    return jax.tree.map(constrain, token_kls(config, params, reference, batch))


def repetition(tokens) -> float:
    """Return the share of a completion's token 3-grams that repeat an earlier one."""
    # Repetition is how a policy that over-optimises often falls apart.
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def table(values: dict[str, float]) -> str:
    """Return the values of an evaluation as a table for a person."""

    def line(name, label, unit=""):
        text = f"{label:<34}{values[f'frontier/{name}']:>10.4f}"
        error = values.get(f"frontier/{name}_se")
        if error:
            text += f" ± {error:.4f}"
        return text + unit

    return "\n".join(
        [
            line("reward", "mean true reward"),
            line("kl", "KL to reference, exact per step", " nats"),
            line("kl_sampled", "KL to reference, log-ratios", " nats"),
            line("length", "mean length, tokens"),
            line("eos_rate", "ended by EOS"),
            line("repetition", "repeated 3-grams"),
        ]
    )


def side_by_side(rows: list[dict], reference_rows: list[dict]) -> str:
    """Return completions of the policy beside those of the reference, for the same prompts."""
    blocks = []
    for row, other in zip(rows, reference_rows, strict=False):
        blocks += [
            f"--- {row['prompt']!r}",
            f"policy    ({row['reward']:.3f}) {row['completion']!r}",
            f"reference ({other['reward']:.3f}) {other['completion']!r}",
        ]
    return "\n".join(blocks)
