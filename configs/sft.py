"""Supervised fine-tuning of your model on your completions, as a start for DPO.

    python -m dpo_jax.train --config=configs/sft.py --config.model.path=MODEL \
        --config.data.path=ROWS --workdir=runs/mine

MODEL: a Hugging Face name or folder. ROWS: rows of prompt and completion, or of text; or preference
pairs, of which the chosen responses are taken.

Hardware: from one CPU up. Weights, gradients and optimiser state take 12 bytes per parameter, over
all devices together. Time: see the progress line after the first steps.
Writes WORKDIR/sft/hf, the model in Hugging Face format, and WORKDIR/sft/metrics.jsonl.
"""

from dpo_jax.config import default


def get_config():
    return default(("sft",))
