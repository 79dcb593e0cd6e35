"""A reward model on your preference pairs: Bradley-Terry, with the paper's settings.

    python -m dpo_jax.train --config=configs/rm.py --config.model.path=MODEL \
        --config.data.path=PAIRS --workdir=runs/mine

MODEL: a Hugging Face name or folder, usually the model that SFT has left. PAIRS: as for
configs/dpo.py. configs/ppo.py trains the same reward model first, or takes this one: give both the
same --workdir, MODEL and PAIRS. A tenth of the prompts is held out (--config.data.eval_fraction).

Hardware: one CPU or more. Weights, gradients and optimiser state take 12 bytes per parameter in
total (split over the devices with mesh.fsdp). Time: the progress line shows an estimate after the
first steps.
Writes WORKDIR/rm/hf, the checkpoint with the best held-out accuracy, which loads in transformers as
a sequence classifier with one label, and WORKDIR/rm/metrics.jsonl. If you change a field of rm, its
name and value are added to the folder, as in WORKDIR/rm-steps500.
"""

from dpo_jax.config import default


def get_config():
    config = default(("rm",))
    config.data.eval_fraction = 0.1  # as configs/ppo.py
    return config
