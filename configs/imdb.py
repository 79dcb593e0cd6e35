"""Controlled sentiment (paper section 6.1): gpt2-large on IMDb, sft -> pairs -> dpo -> evaluate,
beta 0.1.

    python -m dpo_jax.train --config=configs/imdb.py --workdir=runs/imdb
    python -m dpo_jax.train --config=configs/imdb.py:ppo --config.run=ppo_6 --workdir=runs/imdb
    python -m experiments.imdb_frontier --config=configs/imdb.py --workdir=runs/imdb

After the colon a method: dpo (the default), preferred_ft, unlikelihood, ppo (on a reward model),
ppo_gt (on the true reward) or best_of_n; in one WORKDIR they share the stages before. The third
command is the figure's whole sweep. True reward: siebert/sentiment-roberta-large-english. Hardware:
weights, gradients, optimiser state and reference of DPO are 12 GB over all devices. Time: not
measured. Comes out: WORKDIR/evaluate/evaluate.json (reward, KL) and completions.jsonl, and each
stage's hf/.
"""

from dpo_jax.config import default

STAGES = {  # method -> what runs after sft
    "dpo": ("pairs", "dpo", "evaluate"),
    "preferred_ft": ("pairs", "preferred_ft", "evaluate"),
    "unlikelihood": ("pairs", "unlikelihood", "evaluate"),
    "ppo": ("pairs", "rm", "ppo", "evaluate"),
    "ppo_gt": ("ppo", "evaluate"),
    "best_of_n": ("pairs", "rm", "best_of_n"),
}


def get_config(method="dpo"):
    config = default(("sft", *STAGES[method]))
    config.model.path = "openai-community/gpt2-large"
    config.data.update(source="imdb", path="stanfordnlp/imdb")
    config.sampling.update(
        max_new_tokens=60, min_prefix=2, max_prefix=8
    )  # 25,000 prefixes, one of each review
    settings = {
        "sft": dict(microbatch_size=16),
        "dpo": dict(beta=0.1, eval_every=100),
        "unlikelihood": dict(eval_every=100),
        "preferred_ft": dict(eval_every=100),
        "ppo": dict(reward="rm" if method == "ppo" else "true", eval_every=5, epochs=4.0),
    }
    for stage in ("sft", *STAGES[method]):
        config[stage].update(settings.get(stage, {}))
    return config
