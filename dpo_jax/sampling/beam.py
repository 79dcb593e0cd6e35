"""Beam search: the likeliest completion that keeping the K best prefixes finds, without chance.

As `generate` of transformers with num_beams=K and length_penalty=0: a completion's score is its
log-prob, with nothing for its length. With as many beams as there are prefixes it is exact.

Letters: those of sampler.py, with K beams of each prompt, B = P K rows, and R candidates, the best
continuations of a prompt's beams.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax import stopping
from dpo_jax.models import transformer
from dpo_jax.models.loading import Model
from dpo_jax.parallel import sharding
from dpo_jax.parallel.sharding import BATCH, constrain
from dpo_jax.sampling import sampler
from dpo_jax.sampling.sampler import Completion, Sampling


def search(model: Model, prompts: list[np.ndarray], sampling: Sampling) -> list[list[Completion]]:
    """Return the likeliest completion that is found for each prompt, token ids: a list of one.

    Raises ValueError for settings or prompts that cannot be searched.
    """
    sampler.check(model.config, prompts, sampling)
    shards = sharding.batch_shards(model.mesh)
    count = max(1, sampling.batch_size // (sampling.beams * shards)) * shards
    # Prompts of like length share a batch: less padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: list[list[Completion]] = [[] for _ in prompts]
    for start in range(0, len(order), count):
        stopping.may_stop()
        part = order[start : start + count]
        # The last batch is filled up with prompts whose completions are thrown away.
        filled = np.resize(part, count)
        batch = sampler.padded([prompts[index] for index in filled])
        with jax.set_mesh(model.mesh):
            tokens_PM, log_probs_PM = _search(
                model.config,
                sampling.max_new_tokens,
                sampling.beams,
                model.params,
                sharding.shard_batch(model.mesh, batch, axis=0),
                np.array(model.stop_ids or [sampler.NO_EOS], np.int32),
            )
        rows = zip(part, np.asarray(tokens_PM), np.asarray(log_probs_PM), strict=False)
        for index, tokens_M, log_probs_M in rows:
            found[index] = [sampler.completion(tokens_M, log_probs_M, model.stop_ids)]
    return found


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(config, max_new_tokens, beams, params, batch, stop_ids):
    """Return tokens and their log-probs, [P, M] each; 0 after a completion's EOS."""
    lengths_P = batch["lengths"]
    prompts = len(lengths_P)
    x_PD, cache = sampler.prefill(config, params, batch)
    lengths_B = jnp.repeat(lengths_P, beams)
    # Of the continuations that are looked at, at least K do not end, whatever ends.
    candidates = min((1 + len(stop_ids)) * beams, beams * config.vocab)

    def is_unfinished(state):
        # A prefix only becomes less likely, so none that is behind can win any more.
        can_win_P = state["scores_PK"].max(-1) > state["best_P"]
        return (state["m"] < max_new_tokens) & can_win_P.any()

    def extend(state):
        m = state["m"]
        logits_BV = constrain(transformer.unembed(config, params, state["x_BD"]), BATCH, "tensor")
        log_probs_PKV = jax.nn.log_softmax(logits_BV).reshape(prompts, beams, config.vocab)
        totals_PKV = state["scores_PK"][..., None] + log_probs_PKV
        totals_PR, places_PR = jax.lax.top_k(totals_PKV.reshape(prompts, -1), candidates)
        of_places_PR = functools.partial(jnp.take_along_axis, indices=places_PR, axis=-1)
        log_probs_PR = of_places_PR(log_probs_PKV.reshape(prompts, -1))
        beams_PR, tokens_PR = places_PR // config.vocab, places_PR % config.vocab

        def candidate(chosen_PN):
            """Return beam, tokens and log-probs of candidates, by their places among R."""
            beam_PN = jnp.take_along_axis(beams_PR, chosen_PN, axis=1)
            last = {"tokens": tokens_PR, "log_probs": log_probs_PR}
            whole = {}
            for name, last_PR in last.items():
                before_PNM = jnp.take_along_axis(state[name], beam_PN[..., None], axis=1)
                new_PN = jnp.take_along_axis(last_PR, chosen_PN, axis=1)
                whole[name] = before_PNM.at[..., m].set(new_PN)
            return beam_PN, whole

        # One that ends counts if it is among the K best of its step, as in transformers.
        has_ended_PR = (tokens_PR[..., None] == stop_ids).any(-1) | (m + 1 == max_new_tokens)
        is_found_PR = has_ended_PR & (jnp.arange(candidates) < beams)
        found_PR = jnp.where(is_found_PR, totals_PR, -jnp.inf)
        _, found = candidate(found_PR.argmax(-1)[:, None])
        is_better_P = found_PR.max(-1) > state["best_P"]
        best = {}
        for name, found_P1M in found.items():
            best[name] = jnp.where(is_better_P[:, None], found_P1M[:, 0], state["best"][name])

        # The K best of the others go on.
        scores_PK, chosen_PK = jax.lax.top_k(jnp.where(has_ended_PR, -jnp.inf, totals_PR), beams)
        beam_PK, running = candidate(chosen_PK)
        rows_B = (jnp.arange(prompts)[:, None] * beams + beam_PK).ravel()
        cache = {name: x_LBKUC[:, rows_B] for name, x_LBKUC in state["cache"].items()}
        token_B1 = running["tokens"][..., m].reshape(-1, 1)
        x_B1D, cache = transformer.step(config, params, token_B1, (lengths_B + m)[:, None], cache)
        return running | dict(
            m=m + 1,
            scores_PK=scores_PK,
            x_BD=x_B1D[:, 0],
            cache=cache,
            best_P=jnp.maximum(state["best_P"], found_PR.max(-1)),
            best=best,
        )

    # The beams of a prompt begin alike: only one of them counts.
    scores_PK = jnp.full((prompts, beams), -jnp.inf).at[:, 0].set(0.0)
    empty_PKM = jnp.zeros((prompts, beams, max_new_tokens))
    running = dict(tokens=empty_PKM.astype(jnp.int32), log_probs=empty_PKM)
    start = running | dict(
        m=0,
        scores_PK=scores_PK,
        x_BD=jnp.repeat(x_PD, beams, axis=0),
        cache={
            name: sampler.with_room(x_LPKUC, beams, max_new_tokens)
            for name, x_LPKUC in cache.items()
        },
        best_P=jnp.full(prompts, -jnp.inf),
        best={name: x_PKM[:, 0] for name, x_PKM in running.items()},
    )
    best = jax.lax.while_loop(is_unfinished, extend, start)["best"]
    return constrain(best["tokens"]), constrain(best["log_probs"])
