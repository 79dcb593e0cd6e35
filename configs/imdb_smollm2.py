"""Controlled sentiment with a real language model, for two CPU cores: SmolLM2-135M on IMDb.

    python -m dpo_jax.train --config=configs/imdb_smollm2.py
    python -m experiments.imdb_frontier --config=configs/imdb_smollm2.py --workdir=runs/imdb_smollm2

For a model or reviews in a folder instead of the hub, add --config.model.path=FOLDER, or
--config.data.path=FOLDER and --config.reward.path=FOLDER. The methods are those of configs/imdb.py.

The true reward is an n-gram classifier, fitted to the labelled reviews. All weights are trained, in
float32. Writes the same files as configs/imdb.py.
"""

from dpo_jax.config import METHODS, TRL_PPO, default


def get_config(method="dpo"):
    config = default(("sft", *METHODS[method]))
    config.model.path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.data.update(
        source="imdb",
        path="stanfordnlp/imdb",
        train_split="train+unsupervised",
        max_length=64,
        max_prompt_length=16,
        # Some reviews stand in both splits: no prompt is judged that begins one. So a few more are
        # drawn than the 256 that are judged.
        on_leak="drop",
        max_eval_rows=300,
    )
    config.sft.update(
        loss="token_mean",
        batch_size=16,
        steps=200,
        optimizer="adamw",
        lr=5e-5,
        schedule="cosine",
        warmup_steps=20,
        max_grad_norm=1.0,
        eval_every=100,
        save_every=100,
        log_every=10,
    )
    config.reward.update(kind="ngram", path=config.data.path)
    config.sampling.update(max_new_tokens=40, min_prefix=2, max_prefix=8, batch_size=128)
    trained = dict(
        batch_size=24,  # of 4 prompts, with 6 pairs each
        steps=64,
        lr=1e-5,
        warmup_steps=8,
        eval_every=32,
        save_every=32,
        log_every=4,
    )
    settings = {
        "pairs": dict(prompts=256),
        "preferred_ft": trained,
        "unlikelihood": trained,
        "rm": trained | dict(steps=128),
        "dpo": trained | dict(beta=0.1),
        "best_of_n": dict(prompts=64),
        "ppo": dict(
            reward="rm" if method == "ppo" else "true",
            batch_size=128,
            minibatch_size=32,
            inner_epochs=2,
            steps=24,  # 3,072 completions, twice as many as DPO has pairs
            lr=1e-5,
            kl_horizon=1000,
            eval_every=8,
            save_every=4,
        ),
    }
    for stage in METHODS[method]:
        config[stage].update(settings.get(stage, {}))
    if method == "ppo_gt_trl":
        # As many completions as the other PPO runs.
        config.ppo.update(TRL_PPO | dict(kl_horizon=1000, steps=12, eval_every=4))
    return config
