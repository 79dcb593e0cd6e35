"""Controlled sentiment (paper section 6.1): gpt2-large on IMDb, SFT for one epoch, then DPO with beta 0.1.

    python -m dpo_jax.train --config=configs/imdb.py --workdir=runs/imdb
    python -m dpo_jax.train --config=configs/imdb.py:dpo --config.model.path=runs/imdb/sft/hf \
        --config.data.path=PAIRS.jsonl --workdir=runs/imdb

The first command trains the SFT model. The second takes rows of prompt, chosen, rejected: the paper samples 4
completions of 60 tokens for each of 25,000 prefixes of 2 to 8 tokens from the SFT model, and labels all 6 pairs of
a prefix by siebert/sentiment-roberta-large-english. Hardware: weights, optimiser state and reference of DPO are
12 GB over all devices. Time: not measured. Comes out: WORKDIR/sft/hf and WORKDIR/dpo/hf.
"""

from dpo_jax.config import default


def get_config(stage="sft"):
    config = default((stage,))
    if stage == "sft":
        config.model.path = "openai-community/gpt2-large"
        config.data.update(source="imdb", path="stanfordnlp/imdb")
    else:
        config.model.path = "runs/imdb/sft/hf"
        config.data.update(source="local", path="runs/imdb/pairs.jsonl", max_length=72, max_prompt_length=8)
        config.dpo.beta = 0.1
    return config
