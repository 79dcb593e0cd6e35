"""DPO of your model on your preference pairs.

    python -m dpo_jax.train --config=configs/dpo.py --config.model.path=MODEL \
        --config.data.path=PAIRS --workdir=runs/mine

MODEL: a Hugging Face name or folder. PAIRS: rows of prompt, chosen and rejected (jsonl, json,
parquet, csv or a data set on the hub), or a known data set, such as --config.data.source=hh
--config.data.path=Anthropic/hh-rlhf.

Hardware: one CPU or more. Weights, gradients, optimiser state and reference take 16 bytes per
parameter in total (split over the devices with mesh.fsdp). Time: the progress line shows an
estimate after the first steps.
Writes WORKDIR/dpo/hf, the policy in Hugging Face format, and WORKDIR/dpo/metrics.jsonl. If you
change a field of dpo, its name and value are added to the folder, as in WORKDIR/dpo-beta0.5.
"""

from dpo_jax.config import default


def get_config():
    return default(("dpo",))
