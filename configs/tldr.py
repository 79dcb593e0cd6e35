"""Summarisation (paper, section 6.2): DPO at beta 0.5 on human comparisons of TL;DR summaries.

    python -m dpo_jax.train --config=configs/tldr.py --config.mesh.fsdp=-1 --config.mesh.data=1
    python -m dpo_jax.train --config=configs/tldr.py:pythia1b,ppo --workdir=runs/tldr-pythia1b
    python -m experiments.tldr_winrate --config=configs/tldr.py:pythia1b \
        --workdir=runs/tldr-pythia1b --dry_run

You can add a size, a method, or both, separated by a comma, after a colon. Sizes: gptj (the default
and the paper's: GPT-J-6B, already supervised by CarperAI), pythia1b and pythia2.8b (which begin
with the stage sft), and tiny, for tests, on rows that `python -m experiments.tiny_tldr
runs/tldr_tiny` makes. Methods: dpo (the default), preferred_ft, unlikelihood, ppo (on a reward
model) or best_of_n. Methods with the same --workdir share the stages sft and rm. The last command
judges them.

Hardware: weights, gradients, optimiser state and reference of DPO take 97 GB in total for gptj, 16
GB for pythia1b and 45 GB for pythia2.8b, with bfloat16 compute. Time: not measured. Prompts have up
to 512 tokens; if one is cut, its end ("TL;DR:") is kept. A hub model without safetensors is
refused, and the error says how to convert it; then pass the converted folder as
--config.model.path. Writes WORKDIR/dpo/hf.
"""

from dpo_jax.config import default

METHODS = {  # method -> what runs after sft
    "dpo": ("dpo",),
    "preferred_ft": ("preferred_ft",),
    "unlikelihood": ("unlikelihood",),
    "ppo": ("rm", "ppo"),
    "best_of_n": ("rm", "best_of_n"),
}
LARGE = dict(dtype="bfloat16", remat="full")
MODELS = {  # size -> config.model
    "gptj": dict(
        path="CarperAI/openai_summarize_tldr_sft", tokenizer="EleutherAI/gpt-j-6b", **LARGE
    ),
    "pythia1b": dict(path="EleutherAI/pythia-1b-deduped", **LARGE),
    "pythia2.8b": dict(path="EleutherAI/pythia-2.8b-deduped", **LARGE),
    "tiny": dict(
        tokenizer="runs/tldr_tiny/tokenizer",
        scratch=dict(
            model_type="gpt_neox",
            vocab_size=384,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=256,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
}


def get_config(choice=""):
    """Return the config of a size, a method, or both with a comma."""
    words = [word for word in choice.split(",") if word]
    size = next((word for word in words if word in MODELS), "gptj")
    method = next((word for word in words if word in METHODS), "dpo")
    if set(words) - {size, method}:
        raise ValueError(
            f"unknown choice {choice!r}: expected a size ({', '.join(MODELS)}), a method "
            f"({', '.join(METHODS)}), or both with a comma."
        )
    stages = METHODS[method]
    if size != "gptj":  # which is on the hub supervised
        stages = ("sft", *stages)
    config = default(stages)
    config.model.update(MODELS[size])
    config.data.update(
        source="tldr",
        path="CarperAI/openai_summarize_comparisons",
        sft_path="CarperAI/openai_summarize_tldr",
        max_length=640,
        max_prompt_length=512,
    )
    # The paper has settings for DPO alone. The others are those of Huang et al. 2024, who
    # have one learning rate for all.
    other = dict(optimizer="adamw", lr=3e-6, schedule="cosine", warmup_steps=0)
    settings = {
        "sft": other | dict(loss="token_mean", batch_size=128, microbatch_size=32),
        "dpo": dict(microbatch_size=32, beta=0.5),
        "preferred_ft": dict(microbatch_size=32),
        "unlikelihood": dict(microbatch_size=32),
        "rm": other | dict(microbatch_size=32, epochs=1.0),
        "ppo": dict(batch_size=512, minibatch_size=128, microbatch_size=32, lr=3e-6),
    }
    if "rm" in stages:
        config.reward.update(kind="rm", path="")  # no true reward is known
        config.sampling.update(max_new_tokens=53)
    for stage in stages:
        config[stage].update(settings.get(stage, {}))
    if size == "tiny":
        _shrink(config)
    return config


def _shrink(config):
    """Shrink a config to the tests' rows and two CPU cores."""
    config.data.update(
        path="runs/tldr_tiny/comparisons",
        sft_path="runs/tldr_tiny/posts",
        max_length=128,
        max_prompt_length=96,
        max_eval_rows=8,
    )
    trained = dict(batch_size=8, microbatch_size=0, steps=8, lr=1e-3, eval_every=4, save_every=4)
    changed = {"ppo": trained | dict(batch_size=16, minibatch_size=8, steps=2)}
    if "rm" in config.stages:
        config.sampling.update(max_new_tokens=12, batch_size=8)
    for stage in set(config.stages) - {"best_of_n"}:
        config[stage].update(changed.get(stage, trained))
