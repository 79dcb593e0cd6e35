"""Supervised fine-tuning of any model on any completions, as a start for DPO.

    python -m dpo_jax.train --config=configs/sft.py --config.model.path=MODEL \
        --config.data.source=local --config.data.path=ROWS --workdir=runs/mine

ROWS: rows of prompt, completion, or of text; or preference pairs, whose chosen responses are taken.
Hardware: anything from one CPU; weights, gradients and optimiser state take 12 bytes per parameter
over all devices. Time: the progress line says, after the first steps. Comes out: WORKDIR/sft/hf,
the model in Hugging Face format, and WORKDIR/sft/metrics.jsonl.
"""

from dpo_jax.config import default


def get_config():
    return default(("sft",))
