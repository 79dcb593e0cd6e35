"""Summarisation (paper section 6.2): GPT-J-6B, supervised on TL;DR by CarperAI, DPO with beta 0.5.

    python -m dpo_jax.train --config=configs/tldr.py --config.mesh.fsdp=-1 --config.mesh.data=1 --workdir=runs/tldr

Hardware: weights, optimiser state and reference are 97 GB over all devices; bfloat16 compute. Comes out:
WORKDIR/dpo/hf. Prompts are up to 512 tokens and keep their end, "TL;DR:". A hub model that has no safetensors is
refused with the lines that convert it; then pass the converted folder as --config.model.path. Time: not measured.
"""

from dpo_jax.config import default


def get_config():
    config = default(("dpo",))
    config.model.update(path="CarperAI/openai_summarize_tldr_sft", tokenizer="EleutherAI/gpt-j-6b", dtype="bfloat16",
                        remat="full")
    config.data.update(source="tldr", path="CarperAI/openai_summarize_comparisons", eval_split="valid1",
                       max_length=640, max_prompt_length=512)
    config.dpo.update(batch_size=64, microbatch_size=32, beta=0.5)
    return config
