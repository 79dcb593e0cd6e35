"""Controlled sentiment at a size that two CPU cores carry: a small GPT-2 from scratch on the IMDb reviews.

    python -m experiments.imdb_tokenizer --data=../shared/data/imdb/plain_text --out=runs/imdb_small/tokenizer
    python -m dpo_jax.train --config=configs/imdb_small.py --workdir=runs/imdb_small
"""

from dpo_jax.config import default


def get_config():
    config = default(("sft",))
    config.model.tokenizer = "runs/imdb_small/tokenizer"
    config.model.scratch = dict(model_type="gpt2", vocab_size=8192, n_positions=96, n_embd=256, n_layer=4, n_head=4,
                                bos_token_id=0, eos_token_id=0)
    config.data.update(source="imdb", path="../shared/data/imdb/plain_text", train_split="train+unsupervised",
                       max_length=96, max_prompt_length=32)
    config.sft.update(loss="token_mean", batch_size=64, epochs=1.0, optimizer="adamw", lr=1e-3, schedule="cosine",
                      warmup_steps=100, max_grad_norm=1.0, weight_decay=0.01, eval_every=250, save_every=100,
                      log_every=10)
    return config
