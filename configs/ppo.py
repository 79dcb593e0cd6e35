"""PPO of your model on a reward model of your preference pairs, and on your prompts.

    python -m dpo_jax.train --config=configs/ppo.py --config.model.path=MODEL \
        --config.data.path=PAIRS --workdir=runs/mine
    python -m dpo_jax.train --config=configs/ppo.py:model --config.model.path=MODEL \
        --config.data.path=PROMPTS --config.reward.path=REWARD --workdir=runs/mine

The stages are rm (as in configs/rm.py), ppo and evaluate. MODEL: a Hugging Face name or folder,
usually the model that SFT has left. PAIRS: as for configs/dpo.py. PPO samples from their prompts,
or from those of --config.data.sft_path=PROMPTS. PROMPTS: rows of a prompt, text or chat messages;
completions beside it are not used. With the choice model there is no stage rm: REWARD is a reward
model that you have, such as WORKDIR/rm/hf or one of the hub.

A tenth of the prompts is held out, and 8 of those are measured, so that a hundred rows are enough.
Of a few thousand rows, measure more, for smaller standard errors: --config.evaluate.prompts=64, or
128 of ten thousand with --config.data.eval_fraction=0.03 (the same for configs/rm.py).

Hardware: one CPU or more. Weights, gradients, optimiser state and reference take 20 bytes per
parameter in total, and the reward model 4 more (split over the devices with mesh.fsdp). Time: the
progress line shows an estimate after the first steps.
Writes WORKDIR/ppo/hf, the policy in Hugging Face format, WORKDIR/ppo/metrics.jsonl, and
WORKDIR/evaluate: reward, KL and completions on held-out prompts. If you change a field of ppo, its
name and value are added to the folders, as in WORKDIR/ppo-target_kl3.
"""

from dpo_jax.config import default

METHODS = {  # choice -> the stages
    "rm": ("rm", "ppo", "evaluate"),
    "model": ("ppo", "evaluate"),
}


def get_config(choice="rm"):
    config = default(METHODS[choice])
    if choice == "rm":
        config.reward.update(kind="rm", path="")  # no true reward is known
    else:
        config.reward.update(kind="model", path="")
        config.ppo.reward = "true"
    config.sampling.max_new_tokens = 128
    # A quarter of the paper's, whose 25,000 prompts make more steps than yours may.
    config.ppo.update(batch_size=256, minibatch_size=64)
    # Few enough for a hundred rows, of which a tenth is held out.
    config.data.eval_fraction = 0.1
    config.evaluate.prompts = 8
    return config
