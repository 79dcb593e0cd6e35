"""Measure the memory of rows of up to 16,384 tokens, with a tiny Llama on the CPU.

    JAX_NUM_CPU_DEVICES=1 python -m experiments.long_rows
    JAX_NUM_CPU_DEVICES=8 python -m experiments.long_rows

Two steps of DPO are made with a pair whose sequences have 2,048 to 16,384 tokens, as `train
--rehearse` makes them, and the compiler says what a device holds. All devices share the tokens of
each row (`mesh.context`). Each command takes some minutes on 2 cores, which stand for all devices.

Writes a row per length and number of devices to experiments/results/long_rows.jsonl, and prints
them as a table.
"""

import json
import pathlib

import jax

from dpo_jax import command_line
from dpo_jax import config as configs
from dpo_jax.parallel import processes
from dpo_jax.planning import rehearsal

OUT = pathlib.Path("experiments/results/long_rows.jsonl")
LENGTHS = (2048, 4096, 8192, 16_384)  # tokens of a prompt with a response
RESPONSE = 256
MODEL = dict(
    model_type="llama",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTHS[-1],
)


def measure(length: int, devices: int) -> dict:
    """Return what two steps of a pair took on devices that share the tokens of each row."""
    config = configs.default(("dpo",))
    config.model.update(path="", scratch=MODEL, remat="full")
    config.data.update(path="PAIRS", max_length=length, max_prompt_length=length - RESPONSE)
    config.mesh.update(data=1, context=devices)
    config.dpo.batch_size = 1
    made = rehearsal.rehearse(config, "dpo")
    return dict(
        tokens=length,
        devices=devices,
        mib_a_device=made.hbm_gib * 2**10,
        step_seconds=made.step_seconds,
        compile_seconds=made.compile_seconds,
    )


def markdown(rows: list[dict]) -> str:
    """Return the rows as a table."""
    lines = ["| tokens of a row | devices | MiB a device |", "|---:|---:|---:|"]
    for row in rows:
        lines.append(f"| {row['tokens']:,} | {row['devices']} | {row['mib_a_device']:,.0f} |")
    return "\n".join(lines)


def main():
    jax.config.update("jax_platforms", "cpu")
    processes.start()

    def measure_all():
        devices = jax.device_count()
        rows = []
        if OUT.exists():
            rows = [json.loads(line) for line in OUT.read_text().splitlines()]
        rows = [row for row in rows if row["devices"] != devices]
        for length in LENGTHS:
            rows.append(measure(length, devices))
            print(rows[-1], flush=True)
        rows.sort(key=lambda row: (row["devices"], row["tokens"]))
        OUT.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(markdown(rows))

    command_line.run(measure_all, __doc__)


if __name__ == "__main__":
    main()
