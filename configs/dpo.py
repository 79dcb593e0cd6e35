"""DPO of any model on any preference pairs.

    python -m dpo_jax.train --config=configs/dpo.py --config.model.path=MODEL \
        --config.data.source=local --config.data.path=PAIRS --workdir=runs/mine

MODEL: a hub name or folder in Hugging Face format. PAIRS: rows of prompt, chosen, rejected (jsonl,
json, parquet, csv or a hub dataset), or one of the known sets: --config.data.source=hh
--config.data.path=Anthropic/hh-rlhf. Hardware: anything from one CPU; weights, gradients, optimiser
state and reference take 16 bytes per parameter over all devices. Time: the progress line says,
after the first steps. Comes out: WORKDIR/dpo/hf, the policy in Hugging Face format, and
WORKDIR/dpo/metrics.jsonl.
"""

from dpo_jax.config import default


def get_config():
    return default(("dpo",))
