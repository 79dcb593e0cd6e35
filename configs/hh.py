"""Single-turn dialogue (paper section 6.2): Pythia-2.8B on Anthropic-HH, SFT on chosen, then DPO with beta 0.1.

    python -m dpo_jax.train --config=configs/hh.py --config.mesh.fsdp=-1 --config.mesh.data=1 --workdir=runs/hh

Hardware: the reference code takes 1.5 h for SFT and 2.75 h for DPO on four A100-80G; weights, optimiser state and
reference are 45 GB over all devices. Comes out: WORKDIR/sft/hf (also the paper's Preferred-FT) and WORKDIR/dpo/hf.
"""

from dpo_jax.config import default


def get_config():
    config = default(("sft", "dpo"))
    config.model.path = "EleutherAI/pythia-2.8b"
    config.model.remat = "full"
    config.data.update(source="hh", path="Anthropic/hh-rlhf")
    for stage in (config.sft, config.dpo):
        stage.update(batch_size=64, microbatch_size=32)
    config.dpo.beta = 0.1
    return config
