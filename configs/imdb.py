"""Controlled sentiment (paper, section 6.1): gpt2-large on IMDb, DPO at beta 0.1.

    python -m dpo_jax.train --config=configs/imdb.py
    python -m dpo_jax.train --config=configs/imdb.py --config.dpo.beta=0.5
    python -m dpo_jax.train --config=configs/imdb.py:ppo --config.run=ppo_6 --workdir=runs/imdb
    python -m experiments.imdb_frontier --config=configs/imdb.py --workdir=runs/imdb

The stages are sft, pairs (sampled, and labelled by the true reward), dpo and evaluate. You can add
a method after a colon: dpo (the default), preferred_ft, unlikelihood, ppo (on a reward model),
ppo_gt (on the true reward), ppo_gt_trl (on the true reward, by TRL's settings off the shelf) or
best_of_n. Methods with the same --workdir share the earlier stages; give each its own name
(--config.run). The last command runs the whole sweep of figure 2.

The true reward is siebert/sentiment-roberta-large-english. Hardware: weights, gradients, optimiser
state and reference of DPO take 12 GB in total. Time: not measured. Writes
WORKDIR/evaluate/evaluate.json (reward and KL) and completions.jsonl, and each stage's hf/.
"""

from dpo_jax.config import METHODS, TRL_PPO, default


def get_config(method="dpo"):
    config = default(("sft", *METHODS[method]))
    config.model.path = "openai-community/gpt2-large"
    config.data.update(
        source="imdb",
        path="stanfordnlp/imdb",
        # Some reviews stand in both splits: no prompt is judged that begins one. So a few more are
        # drawn than the 256 that are judged.
        on_leak="drop",
        max_eval_rows=300,
    )
    # A prefix of each review: 25,000 prompts.
    config.sampling.update(max_new_tokens=60, min_prefix=2, max_prefix=8)
    settings = {
        "sft": dict(microbatch_size=16),
        "dpo": dict(beta=0.1, eval_every=100),
        "unlikelihood": dict(eval_every=100),
        "preferred_ft": dict(eval_every=100),
        "ppo": dict(reward="rm" if method == "ppo" else "true", eval_every=5, epochs=4.0),
    }
    for stage in ("sft", *METHODS[method]):
        config[stage].update(settings.get(stage, {}))
    if method == "ppo_gt_trl":
        # A step has a quarter of the other runs' completions, so there are four times as many.
        config.ppo.update(TRL_PPO | dict(eval_every=20, save_every=40))
    return config
