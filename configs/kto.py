"""KTO of your model on your labelled completions, each liked or not, without pairs.

    python -m dpo_jax.train --config=configs/kto.py --config.model.path=MODEL \
        --config.data.path=ROWS --workdir=runs/mine

MODEL: a Hugging Face name or folder. ROWS: rows of prompt, completion and label (true or false), as
text or chat messages; or preference pairs, each of which counts as two rows: the chosen response
desirable, the rejected one not. To see what is in them first, and whether both kinds balance:

    python -m dpo_jax.data ROWS --model=MODEL

Hardware: one CPU or more. Weights, gradients, optimiser state and reference take 16 bytes per
parameter in total (split over the devices with mesh.fsdp). A step costs half as much again,
by FLOPs, as DPO's on the same responses. Time: the progress line shows an estimate after the first
steps.
Writes WORKDIR/kto/hf, the policy in Hugging Face format, and WORKDIR/kto/metrics.jsonl. If you
change a field of kto, its name and value are added to the folder, as in WORKDIR/kto-beta0.5.
"""

from dpo_jax.config import default


def get_config():
    return default(("kto",))
