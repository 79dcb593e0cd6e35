"""The plans of experiments/results/pods.md: python -m experiments.pods [--only=NAME ...]

Each run is planned by the TPU compiler as `dpo_jax.plan` does, and beside it what a plain
implementation would take: two padded rows a pair, the logits of every token, a live reference; one
of them also on 16 to 512 chips. One row of pods.jsonl each; those that are there, by the same
command, are not planned again.
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
from dpo_jax.models import transformer
from dpo_jax.parallel import processes
from dpo_jax.parallel.sharding import BATCH, constrain
from dpo_jax.planning import planner, roofline, topologies
from dpo_jax.planning import report as report_lib

OUT = pathlib.Path("experiments/results/pods.jsonl")
BFLOAT16 = {"model.dtype": "bfloat16", "model.remat": "full"}


@dataclasses.dataclass(frozen=True)
class Pod:
    """A run on a topology: a config of configs/, fields of it, and what is assumed."""

    config: str
    topology: str
    fields: dict
    rows: int = 0

    def changed(self, plain: bool) -> dict:
        """What its config is not without this; ours keeps the reference's log-probs."""
        return (
            {"mesh.data": 1, "mesh.fsdp": -1}
            | BFLOAT16
            | self.fields
            | {"dpo.cache_reference": not plain}
        )

    def command(self, plain: bool) -> str:
        """The plan of our step of its config; the plain step has no command but this module's."""
        own = [f"--config.{name}={value}" for name, value in self.changed(plain).items()]
        more = [f"--rows={self.rows}"] * bool(self.rows)
        return " ".join(
            [
                "python -m dpo_jax.plan",
                f"--config=configs/{self.config}.py",
                f"--topology={self.topology}",
                *own,
                *more,
            ]
        )


def llama(size: str, topology: str, **fields) -> Pod:
    """DPO of Llama 3 on 60,000 pairs of up to 512 tokens."""
    named = {name.replace("__", "."): value for name, value in fields.items()}
    return Pod(
        "dpo",
        topology,
        {"model.path": f"llama-3-{size}", "data.path": "PAIRS"} | named,
        rows=60_000,
    )


PODS = {
    "gpt-j-6b tl;dr": Pod("tldr", "v4-32", {}),
    "pythia-2.8b hh": Pod("hh", "v5e-16", {}),
    "llama-3-8b": llama("8b", "v5p-16"),
    "llama-3-8b v5e": llama("8b", "v5e-64"),
    "llama-3-70b": llama("70b", "v5p-256", mesh__tensor=2),
}
# The same run, its batch still 64 pairs, on more and more chips than the 8 of v5p-16.
GROWTH = {
    chips: llama("8b", f"v5p-{2 * chips}", **({"mesh__tensor": tensor} if tensor > 1 else {}))
    for chips, tensor in {16: 1, 32: 1, 64: 1, 128: 2, 256: 4, 512: 8}.items()
}


def padded_rows(model, _batch, *, pairs: int, microbatches: int, length: int):
    """(objective, batch) of a plain DPO: each response a row with its prompt, padded to the
    longest; full logits.
    """
    shape = (microbatches, 2 * pairs // microbatches, length)

    def log_probs(params, batch):
        tokens_BT = batch["tokens"]
        positions_BT = jnp.broadcast_to(jnp.arange(length), tokens_BT.shape)
        x_BTD = transformer.hidden(model, params, tokens_BT, positions_BT)
        logits_BTV = constrain(transformer.unembed(model, params, x_BTD), BATCH, None, "tensor")
        log_probs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
        log_probs_BT = jnp.take_along_axis(log_probs_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
        return (log_probs_BT * batch["scored"][:, 1:]).sum(-1)

    def objective(params, reference, hyper, batch):
        ratio_B = log_probs(params, batch) - jax.lax.stop_gradient(log_probs(reference, batch))
        ratio_P2 = ratio_B.reshape(-1, 2)
        margin_P = ratio_P2[:, 0] - ratio_P2[:, 1]
        loss_P = -jax.nn.log_sigmoid(hyper["beta"] * margin_P)
        loss = (loss_P.sum(), jnp.float32(len(loss_P)))
        return loss, {"loss": loss}

    return objective, dict(tokens=np.zeros(shape, np.int32), scored=np.zeros(shape, np.float32))


def row(pod: Pod, plain: bool) -> dict:
    """The report of a pod, by our step or by the plain one."""
    config = importlib.import_module(f"configs.{pod.config}").get_config()
    config.update_from_flattened_dict(pod.changed(plain))
    topology, started = topologies.parse(pod.topology), time.monotonic()
    instead = None
    if plain:
        block = config.dpo
        instead = functools.partial(
            padded_rows,
            pairs=block.batch_size,
            length=sum(planner.example_tokens(config, "dpo", planner.Assumptions())),
            microbatches=block.batch_size // (block.microbatch_size or block.batch_size),
        )
    assumed = planner.Assumptions(examples=pod.rows)
    report = planner.plan(config, topology, "dpo", assumed, instead)
    print(report_lib.table(report), flush=True)
    seconds = time.monotonic() - started
    return report.to_dict() | dict(command=pod.command(plain), compile_seconds=seconds)


def markdown(rows: list[dict]) -> str:
    """The tables of pods.md: what each run takes, and what of it by kind."""
    return "\n".join([*_table(TAKES, rows, _takes), "", *_table(LIMITS, rows, _limits)])


TAKES = "run, topology, mesh, GiB a chip, least s a step, without overlap, bottleneck, chip-hours"
LIMITS = (
    "run, products s, memory s, interconnect s, all-gather GiB, reduce-scatter GiB, all-reduce GiB, "
    "collective-permute GiB"
)


def _table(heads: str, rows: list[dict], cells) -> list[str]:
    heads = heads.split(", ")
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *map(cells, rows))]


def _takes(found: dict) -> list[str]:
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1)
    memory = f"{found['hbm_gib_per_chip']:.1f} of {found['capacity_gib']:.1f}" + (
        "" if found["fits"] else ": no"
    )
    if not found["seconds"]:
        return [found["name"], found["topology"], mesh, memory, *["-"] * 4]
    return [
        found["name"],
        found["topology"],
        mesh,
        memory,
        f"{found['step_seconds']:.3g}",
        f"{found['step_seconds_without_overlap']:.3g}",
        roofline.PARTS[found["bottleneck"]],
        f"{found['chip_hours']:.1f}",
    ]


def _limits(found: dict) -> list[str]:
    sent = found["collectives"] or {}
    return [
        found["name"],
        *(f"{found['seconds'][part]:.3g}" if found["seconds"] else "-" for part in roofline.PARTS),
        *(
            f"{sent.get(kind, dict(gib=0))['gib']:.1f}"
            for kind in ("all-gather", "reduce-scatter", "all-reduce", "collective-permute")
        ),
    ]


def main():
    only = flags.DEFINE_multi_string(
        "only", [], "Plan these names alone, as they stand in pods.jsonl."
    )
    jax.config.update("jax_platforms", "cpu")
    processes.start()

    def plan_all():
        rows = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else []
        done = {(row["name"], row["command"]) for row in rows}
        wanted = {
            f"{name}, {kind}": (pod, kind == "plain")
            for kind in ("ours", "plain")
            for name, pod in PODS.items()
        }
        wanted |= {f"llama-3-8b on {chips}": (pod, False) for chips, pod in GROWTH.items()}
        for name, (pod, plain) in wanted.items():
            if (name, pod.command(plain)) in done or only.value and name not in only.value:
                continue
            print(f"{name}: {pod.command(plain)}", flush=True)
            report = dict(name=name) | row(pod, plain)
            rows = [*(old for old in rows if old["name"] != name), report]
            OUT.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(markdown([found for name in wanted for found in rows if found["name"] == name]))

    command_line.run(plan_all, __doc__)


if __name__ == "__main__":
    main()
