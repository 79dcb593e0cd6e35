"""Supervised fine-tuning of your model on your completions, as a starting point for DPO.

    python -m dpo_jax.train --config=configs/sft.py --config.model.path=MODEL \
        --config.data.path=ROWS --workdir=runs/mine

MODEL: a Hugging Face name or folder. ROWS: rows of prompt and completion, or of text; or preference
pairs, of which the chosen responses are used.

Hardware: one CPU or more. Weights, gradients and optimiser state take 12 bytes per parameter in
total (split over the devices with mesh.fsdp). Time: the progress line shows an estimate after the
first steps. Writes WORKDIR/sft/hf, the model in Hugging Face format, and WORKDIR/sft/metrics.jsonl.
"""

from dpo_jax.config import default


def get_config():
    return default(("sft",))
