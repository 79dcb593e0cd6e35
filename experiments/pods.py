"""Plan large runs on TPU pods and GPUs, for the tables of experiments/results/pods.md.

    python -m experiments.pods [--only=NAME ...]

Each run is planned by the TPU compiler, as `dpo_jax.plan` does, and so is a plain implementation of
the same run: two padded rows per pair, the logits of every token, a live reference. Runs on data
with several pairs a prompt are planned with and without what these share. One of the runs is also
planned on 16 to 512 chips. The paper's runs and some of today's models are planned for 1, 8 and 32
GPUs by the GPU compiler.

Writes a row per plan to experiments/results/pods.jsonl and prints the tables. A plan whose command
is already there is not made again.
"""

import dataclasses
import functools
import importlib
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dpo_jax import command_line
from dpo_jax.data.batches import microbatches_of
from dpo_jax.models import transformer
from dpo_jax.parallel import processes
from dpo_jax.parallel.sharding import BATCH, constrain
from dpo_jax.planning import groups, planner, roofline, topologies
from dpo_jax.planning import report as report_lib

OUT = pathlib.Path("experiments/results/pods.jsonl")
BFLOAT16 = {"model.dtype": "bfloat16", "model.remat": "full"}


@dataclasses.dataclass(frozen=True)
class Pod:
    """A run on a topology: a config of configs/, changes of its fields, and its examples."""

    config: str
    topology: str
    fields: dict
    examples: int = 0  # 0: the config tells
    pairs: int = 0  # of a prompt; 0: the config tells
    responses: int = 0

    @property
    def assumed(self) -> planner.Assumptions:
        return planner.Assumptions(
            examples=self.examples,
            pairs_per_prompt=self.pairs,
            responses_per_prompt=self.responses,
        )

    def changed(self, plain: bool) -> dict:
        """Return the fields that differ from the config; only our step caches the reference."""
        mesh = {"mesh.data": 1, "mesh.fsdp": -1}
        return mesh | BFLOAT16 | self.fields | {"dpo.cache_reference": not plain}

    def command(self, plain: bool) -> str:
        """Return the command that plans our step of this config.

        For the plain step it only identifies the plan: no command but this module's makes it.
        """
        words = [
            "python -m dpo_jax.plan",
            f"--config=configs/{self.config}.py",
            f"--topology={self.topology}",
        ]
        for name, value in self.changed(plain).items():
            words.append(f"--config.{name}={value}")
        if self.examples:
            words.append(f"--rows={self.examples}")
        if self.pairs:
            words.append(f"--pairs_per_prompt={self.pairs}")
            words.append(f"--responses_per_prompt={self.responses}")
        return " ".join(words)


def on_pairs(model: str, topology: str, **axes: int) -> Pod:
    """Return DPO of a model on 60,000 pairs of up to 512 tokens, one a prompt.

    axes: sizes of the mesh's axes besides fsdp, such as tensor=2.
    """
    fields = {"model.path": model, "data.path": "PAIRS"}
    for axis, size in axes.items():
        fields[f"mesh.{axis}"] = size
    return Pod("dpo", topology, fields, examples=60_000)


# A batch of TL;DR is one microbatch: of two on 16 chips, each cell would hold half of the pairs of
# a prompt.
TLDR = {"dpo.microbatch_size": 0}
IN_GROUPS = {"data.order": "prompts"}
APART = {"data.order": "pairs"}
PODS = {
    "gpt-j-6b tl;dr": Pod("tldr", "v4-32", TLDR | APART),
    "gpt2-large imdb": Pod("imdb", "v5e-8", {"dpo.batch_size": 96} | APART),
    "pythia-2.8b hh": Pod("hh", "v5e-16", {}),
    "llama-3-8b": on_pairs("llama-3-8b", "v5p-16"),
    "llama-3-8b v5e": on_pairs("llama-3-8b", "v5e-64"),
    "llama-3-70b": on_pairs("llama-3-70b", "v5p-256", tensor=2),
}
# The same with prompts that have several pairs: TL;DR with 4 of 5 summaries, which is a guess, and
# IMDb with the 6 of the paper's 4 completions.
GROUPS = {
    "gpt-j-6b tl;dr, ours, 4 pairs a prompt": Pod(
        "tldr", "v4-32", TLDR | IN_GROUPS, pairs=4, responses=5
    ),
    "gpt2-large imdb, ours, 6 pairs a prompt": Pod(
        "imdb", "v5e-8", {"dpo.batch_size": 96} | IN_GROUPS
    ),
    "gpt2-large imdb, 64 pairs on 64": Pod("imdb", "v5e-64", IN_GROUPS),
    "gpt2-large imdb, 384 pairs on 64": Pod("imdb", "v5e-64", {"dpo.batch_size": 384} | IN_GROUPS),
}
# Chips -> the same run with the same batch of 64 pairs, on more chips than the 8 of v5p-16. A v5p
# is named by its cores, two per chip. With more chips than pairs, the weights are split further.
GROWTH = {
    16: on_pairs("llama-3-8b", "v5p-32"),
    32: on_pairs("llama-3-8b", "v5p-64"),
    64: on_pairs("llama-3-8b", "v5p-128"),
    128: on_pairs("llama-3-8b", "v5p-256", tensor=2),
    256: on_pairs("llama-3-8b", "v5p-512", tensor=4),
    512: on_pairs("llama-3-8b", "v5p-1024", tensor=8),
}
# Families whose layers differ, are normed otherwise, or have experts, on small slices. The experts
# are gathered on one mesh, as all weights are; on the other they stay, and tokens come to them.
OTHER_FAMILIES = {
    "gemma-3-4b": on_pairs("gemma-3-4b", "v5e-8"),
    # fsdp alone would take 18.4 GiB a chip: each would hold the whole head and its gradient.
    "gemma-2-9b": on_pairs("gemma-2-9b", "v5e-16", tensor=2),
    "olmo-2-7b": on_pairs("olmo-2-7b", "v4-16"),
    "smollm3-3b": on_pairs("smollm3-3b", "v5e-8"),
    "qwen3-30b-a3b": on_pairs("qwen3-30b-a3b", "v5p-16"),
    "qwen3-30b-a3b, expert 4": on_pairs("qwen3-30b-a3b", "v5p-16", expert=4),
}
PAIRS = {"data.path": "PAIRS"}
# Tokens of a row, half of them prompt, and how many of the 16 chips of a v5p-32 share each.
LONG_ROWS = ((16_384, 1), (16_384, 4), (65_536, 1), (65_536, 4), (65_536, 16))
# Run -> config, its changes, examples, and the pairs that one GPU holds at a time (0: all of them).
# 192 pairs of IMDb are 32 prompts, so that the pairs of each stay together on 32 GPUs too.
ON_GPUS = {
    "gpt2-large imdb": ("imdb", {"dpo.batch_size": 192} | IN_GROUPS, 0, 0),
    "pythia-2.8b hh": ("hh", {}, 0, 8),
    "gpt-j-6b tl;dr": ("tldr", APART, 0, 8),
    "llama-3-8b": ("dpo", PAIRS | {"model.path": "llama-3-8b"}, 60_000, 8),
    "qwen3-8b": ("dpo", PAIRS | {"model.path": "qwen3-8b"}, 60_000, 8),
    "llama-3-70b": ("dpo", PAIRS | {"model.path": "llama-3-70b"}, 60_000, 8),
}
GPUS = ("h100:1", "h100:8", "h100:4x8")
# The columns of the two tables.
TAKES = (
    "run",
    "numbers by",
    "topology",
    "mesh",
    "pairs a step",
    "tokens a step",
    "GiB a chip",
    "least s a step",
    "without overlap",
    "bottleneck",
    "chip-hours",
)
LIMITS = (
    "run",
    "products s",
    "memory s",
    "interconnect s",
    "all-gather GiB",
    "reduce-scatter GiB",
    "all-reduce GiB",
    "collective-permute GiB",
    "all-to-all GiB",
)
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")


def padded_rows(model, _batch, *, pairs: int, microbatches: int, length: int):
    """Return (objective, batch) of a plain DPO, in place of the planner's own.

    Each response is a row with its prompt, padded to the longest, and all logits are kept.
    """
    # Chosen and rejected follow each other, so that ratio_B folds into pairs below.
    shape = (microbatches, 2 * pairs // microbatches, length)

    def log_probs(params, batch):
        tokens_BT = batch["tokens"]
        positions_BT = jnp.broadcast_to(jnp.arange(length), tokens_BT.shape)
        x_BTD = transformer.hidden(model, params, tokens_BT, positions_BT)
        logits_BTV = constrain(transformer.unembed(model, params, x_BTD), BATCH, None, "tensor")
        log_probs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
        log_probs_BT = jnp.take_along_axis(log_probs_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
        return (log_probs_BT * batch["completion_mask"][:, 1:]).sum(-1)

    def objective(params, reference, hyper, batch):
        ratio_B = log_probs(params, batch) - jax.lax.stop_gradient(log_probs(reference, batch))
        ratio_P2 = ratio_B.reshape(-1, 2)
        margin_P = ratio_P2[:, 0] - ratio_P2[:, 1]
        loss_P = -jax.nn.log_sigmoid(hyper["beta"] * margin_P)
        loss = (loss_P.sum(), jnp.float32(len(loss_P)))
        return loss, {"loss": loss}

    return objective, dict(
        tokens=np.zeros(shape, np.int32), completion_mask=np.zeros(shape, np.float32)
    )


def plan(pod: Pod, plain: bool) -> dict:
    """Plan our step of a run, or the plain one; print the plan and return its row."""
    started = time.monotonic()
    config = importlib.import_module(f"configs.{pod.config}").get_config()
    config.update_from_flattened_dict(pod.changed(plain))
    topology = topologies.parse(pod.topology)
    instead = None
    if plain:
        group = groups.group_of(config, "dpo", pod.assumed)
        instead = functools.partial(
            padded_rows,
            pairs=config.dpo.batch_size,
            microbatches=microbatches_of(config.dpo),
            length=group.prompt_tokens + group.response_tokens,
        )
    report = planner.plan(config, topology, "dpo", pod.assumed, instead)
    print(report_lib.table(report), flush=True)
    row = report.to_dict()
    if plain:  # which shares nothing: each response has a row of the full length
        row["sharing"] = dict(tokens=2 * config.dpo.batch_size * instead.keywords["length"])
    seconds = time.monotonic() - started
    return row | dict(command=pod.command(plain), compile_seconds=seconds)


def markdown(rows: list[dict]) -> str:
    """Return the tables of pods.md: what each run takes, and what limits it."""
    takes = [TAKES, ["---"] * len(TAKES), *map(_takes, rows)]
    limits = [LIMITS, ["---"] * len(LIMITS), *map(_limits, rows)]
    lines = []
    for cells in takes:
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for cells in limits:
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _takes(row: dict) -> list[str]:
    """Return the cells of a row in the first table."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
    memory = f"{row['hbm_gib_per_chip']:.1f} of {row['capacity_gib']:.1f}"
    if not row["fits"]:
        memory += ": no"
    cells = [
        row["name"],
        "compiler" if row["compiled"] else "estimate",
        row["topology"],
        mesh or "-",
        str(row["batch_size"]),
        f"{row['sharing']['tokens']:,.0f}",
        memory,
    ]
    if not row["seconds"]:  # nothing is known of the time of a step that does not fit
        return cells + ["-"] * (len(TAKES) - len(cells))
    return cells + [
        f"{row['step_seconds']:.3g}",
        f"{row['step_seconds_without_overlap']:.3g}",
        roofline.PARTS[row["bottleneck"]],
        f"{row['chip_hours']:.1f}",
    ]


def _limits(row: dict) -> list[str]:
    """Return the cells of a row in the second table."""
    cells = [row["name"]]
    for part in roofline.PARTS:
        cells.append(f"{row['seconds'][part]:.3g}" if row["seconds"] else "-")
    sent = row["collectives"] or {}
    for kind in COLLECTIVES:
        gib = sent[kind]["gib"] if kind in sent else 0
        cells.append(f"{gib:.1f}")
    return cells


def gpu_plans() -> dict[str, Pod]:
    """Return name -> run, for the runs of ON_GPUS on 1, 8 and 32 GPUs."""
    plans = {}
    for name, (config, fields, examples, alone) in ON_GPUS.items():
        for topology in GPUS:
            if name == "llama-3-70b" and topology != "h100:4x8":
                continue  # its weights and optimiser state take 560 GB
            microbatch = alone if topology == "h100:1" else 0
            changed = fields | {"dpo.microbatch_size": microbatch}
            plans[f"{name} on {topology}"] = Pod(config, topology, changed, examples)
    llama_8b = PAIRS | {"model.path": "llama-3-8b"}
    # Weights are gathered within machines alone, and gradients summed between them.
    within = llama_8b | {"mesh.data": 4, "mesh.fsdp": 8, "dpo.microbatch_size": 0}
    plans["llama-3-8b on h100:4x8, data 4"] = Pod("dpo", "h100:4x8", within, 60_000)
    # One GPU cannot hold the whole state of so many weights.
    adapters = llama_8b | {"model.lora.rank": 16, "dpo.microbatch_size": 8}
    plans["llama-3-8b on h100:1, lora"] = Pod("dpo", "h100:1", adapters, 60_000)
    return plans


def long_plans() -> dict[str, Pod]:
    """Return name -> run, for rows of LONG_ROWS; a microbatch is a pair for each shard."""
    plans = {}
    for tokens, context in LONG_ROWS:
        fields = PAIRS | {
            "model.path": "llama-3-8b",
            "data.max_length": tokens,
            "data.max_prompt_length": tokens // 2,
            "mesh.context": context,
            "dpo.batch_size": 16,
            "dpo.microbatch_size": 16 // context,
        }
        name = f"llama-3-8b, {tokens:,} tokens, context {context}"
        plans[name] = Pod("dpo", "v5p-32", fields, 60_000)
    return plans


def all_plans() -> dict[str, tuple[Pod, bool]]:
    """Return name -> (run, whether by the plain step), in the order of the tables."""
    plans = {f"{name}, ours": (pod, False) for name, pod in PODS.items()}
    plans |= {name: (pod, False) for name, pod in GROUPS.items()}
    plans |= {f"{name}, plain": (pod, True) for name, pod in PODS.items()}
    plans |= {f"llama-3-8b on {chips}": (pod, False) for chips, pod in GROWTH.items()}
    plans |= {name: (pod, False) for name, pod in OTHER_FAMILIES.items()}
    plans |= {name: (pod, False) for name, pod in long_plans().items()}
    return plans | {name: (pod, False) for name, pod in gpu_plans().items()}


def sections() -> dict[str, list[str]]:
    """Return the sections of pods.md, each with the names of its plans."""
    several = ["gpt-j-6b tl;dr", "gpt2-large imdb"]
    return {
        "Prompts with several pairs": [
            *(f"{name}, ours" for name in several),
            *GROUPS,
            *(f"{name}, plain" for name in several),
        ],
        "One pair a prompt": [
            name
            for name, (pod, _) in all_plans().items()
            if pod in PODS.values() and name.rpartition(",")[0] not in several
        ],
        "From 8 to 512 chips": [f"llama-3-8b on {chips}" for chips in GROWTH],
        "Other families": list(OTHER_FAMILIES),
        "Long rows": list(long_plans()),
        "GPUs": list(gpu_plans()),
    }


def main():
    only = flags.DEFINE_multi_string(
        "only", [], "Plan only the runs of these names, as in pods.jsonl. Default: all."
    )
    jax.config.update("jax_platforms", "cpu")  # the compilers need neither TPU nor GPU
    # As stand-ins for GPUs whose compiler is not installed.
    jax.config.update("jax_num_cpu_devices", 32)
    processes.start()

    def plan_all():
        rows = {}
        if OUT.exists():
            rows = {row["name"]: row for row in map(json.loads, OUT.read_text().splitlines())}
        plans = all_plans()
        unknown = [name for name in only.value if name not in plans]
        if unknown:
            raise ValueError(f"--only={unknown[0]}: expected one of {', '.join(plans)}.")
        for name, (pod, plain) in plans.items():
            command = pod.command(plain)
            planned = name in rows and rows[name]["command"] == command
            if planned or (only.value and name not in only.value):
                continue
            print(f"{name}: {command}", flush=True)
            rows.pop(name, None)  # a new plan goes to the end of the file
            rows[name] = dict(name=name) | plan(pod, plain)
            # After each plan, as one takes minutes.
            OUT.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
        for title, names in sections().items():
            print(f"\n{title}\n\n{markdown([rows[name] for name in names if name in rows])}")

    command_line.run(plan_all, __doc__)


if __name__ == "__main__":
    main()
