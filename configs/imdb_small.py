"""Controlled sentiment for two CPU cores: a small GPT-2, trained from scratch on the IMDb reviews.

    python -m experiments.imdb_tokenizer --out=runs/imdb_small/tokenizer
    python -m dpo_jax.train --config=configs/imdb_small.py
    python -m experiments.imdb_frontier --config=configs/imdb_small.py --workdir=runs/imdb_small

For reviews in a folder instead of the hub, add --data=FOLDER to the first command, and
--config.data.path=FOLDER --config.reward.path=FOLDER to the others. The methods are those of
configs/imdb.py.

The true reward is an n-gram classifier, fitted to the labelled reviews. The model has 4 layers of
width 192 (3.4 million weights) over a byte-level BPE of 8,192 pieces, and is trained for 2.5 epochs
on the first 72 tokens of 75,000 reviews. Writes the same files as configs/imdb.py.
"""

from dpo_jax.config import METHODS, TRL_PPO, default


def get_config(method="dpo"):
    config = default(("sft", *METHODS[method]))
    config.model.tokenizer = "runs/imdb_small/tokenizer"
    config.model.scratch = dict(
        model_type="gpt2",
        vocab_size=8192,
        n_positions=72,
        n_embd=192,
        n_layer=4,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.data.update(
        source="imdb",
        path="stanfordnlp/imdb",
        train_split="train+unsupervised",
        max_length=72,
        max_prompt_length=32,
        # Some reviews stand in both splits: no prompt is judged that begins one. So a few more are
        # drawn than the 256 that are judged.
        on_leak="drop",
        max_eval_rows=300,
    )
    config.sft.update(
        loss="token_mean",
        batch_size=16,
        epochs=2.5,
        optimizer="adamw",
        lr=2e-3,
        schedule="cosine",
        warmup_steps=200,
        max_grad_norm=1.0,
        weight_decay=0.01,
        eval_every=1000,
        save_every=500,
        log_every=50,
    )
    config.reward.update(kind="ngram", path=config.data.path)
    config.sampling.update(max_new_tokens=60, min_prefix=2, max_prefix=8)
    trained = dict(
        batch_size=32,
        steps=160,
        lr=3e-5,
        warmup_steps=20,
        eval_every=40,
        save_every=40,
        log_every=5,
    )
    settings = {
        "pairs": dict(prompts=1500),
        "preferred_ft": trained,
        "unlikelihood": trained,
        "rm": trained | dict(steps=240, lr=1e-4),
        "dpo": trained | dict(beta=0.1),
        "best_of_n": dict(prompts=64),
        "ppo": dict(
            reward="rm" if method == "ppo" else "true",
            batch_size=128,
            minibatch_size=64,
            inner_epochs=2,
            steps=40,
            lr=1e-4,
            kl_horizon=1000,
            eval_every=10,
            save_every=5,
        ),
    }
    for stage in METHODS[method]:
        config[stage].update(settings.get(stage, {}))
    if method == "ppo_gt_trl":
        # As many completions as the other PPO runs. TRL's learning rate is for a GPT-2 that is
        # trained for longer.
        fitted = dict(lr=1e-4, kl_horizon=1000, steps=20, eval_every=5)
        config.ppo.update(TRL_PPO | fitted)
    return config
