"""DPO of your model on your preference pairs.

    python -m dpo_jax.train --config=configs/dpo.py --config.model.path=MODEL \
        --config.data.path=PAIRS --workdir=runs/mine

MODEL: a Hugging Face name or folder. PAIRS: rows of prompt, chosen and rejected (jsonl, json,
parquet, csv or a data set of the hub), or a known set, such as --config.data.source=hh
--config.data.path=Anthropic/hh-rlhf.

Hardware: from one CPU up. Weights, gradients, optimiser state and reference take 16 bytes per
parameter, over all devices together. Time: see the progress line after the first steps.
Writes WORKDIR/dpo/hf, the policy in Hugging Face format, and WORKDIR/dpo/metrics.jsonl; where a
field of dpo is changed, dpo is followed by its name and value, as in WORKDIR/dpo-beta0.5.
"""

from dpo_jax.config import default


def get_config():
    return default(("dpo",))
