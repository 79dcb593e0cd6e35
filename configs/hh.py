"""Single-turn dialogue (paper, section 6.2): Pythia-2.8B on Anthropic HH, SFT and DPO at beta 0.1.

    python -m dpo_jax.train --config=configs/hh.py --config.mesh.fsdp=-1 --config.mesh.data=1
    python -m experiments.hh_winrate --config=configs/hh.py --workdir=runs/hh --dry_run

You can add a method after a colon: dpo (the default), unlikelihood or best_of_n (ranked by a reward
model). Methods with the same --workdir share the sft stage, which is the paper's Preferred-FT. The
second command judges the methods, and DPO at each of its checkpoints: one every 300 steps, 22 GB
each (--config.dpo.keep=1 keeps only the last).

Hardware: weights, gradients, optimiser state and reference take 45 GB in total. The paper's
reference code takes 1.5 h for SFT and 2.75 h for DPO on four A100-80G. Writes WORKDIR/sft/hf and
WORKDIR/dpo/hf.
"""

from dpo_jax.config import default

METHODS = {  # method -> what runs after sft
    "dpo": ("dpo",),
    "unlikelihood": ("unlikelihood",),
    "best_of_n": ("rm", "best_of_n"),
}


def get_config(method="dpo"):
    config = default(("sft", *METHODS[method]))
    config.model.path = "EleutherAI/pythia-2.8b"
    config.model.remat = "full"
    config.data.update(source="hh", path="Anthropic/hh-rlhf")
    settings = {
        "dpo": dict(beta=0.1, save_every=300, keep=100),
        "rm": dict(optimizer="adamw", lr=3e-6, schedule="cosine", warmup_steps=0, epochs=1.0),
    }
    if method == "best_of_n":
        config.reward.update(kind="rm", path="")  # no true reward is known
        config.sampling.update(max_new_tokens=256)
    for stage in set(config.stages) - {"best_of_n"}:
        config[stage].update(dict(batch_size=64, microbatch_size=32) | settings.get(stage, {}))
    return config
