"""Measure K policies trained as one program against K programs one after the other.

    python -m experiments.benchmark.side_by_side --model=gpt2-tiny --shape=imdb --out=FILE.json

The policies are the points of a sweep: they share the model, the batches and the cached reference,
and each has its own beta. "Side by side" is our own train step under vmap over states and
hyperparameters; "in turn" is the same step once per policy. Both run on one device and take turns,
so that other load on the host slows both.

Writes and prints the seconds in which every policy makes a step, their ratio in each round, the
bytes of the programs' temporaries, and how far apart the weights of the two ways end.
"""

import json
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

BETAS = (0.05, 0.1, 1.0, 5.0)
PAIRS = 8


def measure(model: dict, shape: str, rounds: int, steps: int) -> dict:
    """Return both ways' seconds per step of all policies, and the weights' largest difference."""
    from experiments.benchmark import ours, work

    told = work.Work(pairs=PAIRS, steps=steps, cached=True, dtype="float32")
    with tempfile.TemporaryDirectory(prefix="dpo_jax_side_by_side_") as folder:
        folder = pathlib.Path(folder)
        work.write(folder, told, model, *work.lengths(shape, PAIRS * steps))
        trainer = ours.Trainer(folder, told)
    batches = [trainer.load(step) for step in range(steps)]
    hypers = [trainer.hyper | dict(beta=jnp.float32(beta)) for beta in BETAS]
    stacked_hyper = _stack(hypers)

    with jax.set_mesh(trainer.mesh):
        in_turn = [jax.tree.map(jnp.copy, trainer.state) for _ in BETAS]
        together = _stack(in_turn)
        step_one = trainer.programs.train_step
        step_all = jax.jit(
            jax.vmap(step_one.__wrapped__, in_axes=(0, None, 0, None)), donate_argnums=0
        )
        in_turn_seconds, together_seconds = [], []
        for _ in range(1 + rounds):
            began = time.perf_counter()
            for batch in batches:
                for k, hyper in enumerate(hypers):
                    in_turn[k], _ = step_one(in_turn[k], None, hyper, batch)
            jax.block_until_ready(in_turn)
            between = time.perf_counter()
            for batch in batches:
                together, _ = step_all(together, None, stacked_hyper, batch)
            jax.block_until_ready(together)
            ended = time.perf_counter()
            in_turn_seconds.append((between - began) / steps)
            together_seconds.append((ended - between) / steps)

        stacked = _stack([state.params for state in in_turn])
        differences = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), together.params, stacked)
        largest_difference = max(float(x) for x in jax.tree.leaves(differences))
        temporary_bytes = dict(
            in_turn=_temporary_bytes(step_one, in_turn[0], hypers[0], batches[0]),
            side_by_side=_temporary_bytes(step_all, together, stacked_hyper, batches[0]),
        )

    # The first round compiled.
    in_turn_seconds, together_seconds = in_turn_seconds[1:], together_seconds[1:]
    return dict(
        policies=len(BETAS),
        in_turn=in_turn_seconds,
        side_by_side=together_seconds,
        ratio=[a / b for a, b in zip(in_turn_seconds, together_seconds, strict=True)],
        largest_difference=largest_difference,
        temporary_bytes=temporary_bytes,
    )


def _stack(trees: list):
    """Return one tree whose arrays stack those of the trees."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def _temporary_bytes(program, state, hyper, batch) -> int:
    """Return the bytes that a compiled step needs in addition to its inputs and outputs."""
    compiled = program.lower(state, None, hyper, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def table(found: dict) -> str:
    """Return the measurements as text: median (least to most)."""
    lines = [f"{found['policies']} policies, seconds in which each makes a step:"]
    for name in ("in_turn", "side_by_side", "ratio"):
        values = found[name]
        title = name.replace("_", " ")
        lines.append(
            f"{title:<14}{statistics.median(values):>9.4f}"
            f"  ({min(values):.4f} to {max(values):.4f})"
        )
    sizes = []
    for name, size in found["temporary_bytes"].items():
        sizes.append(f"{name.replace('_', ' ')} {size / 2**20:.0f} MiB")
    lines.append(
        f"temporaries: {', '.join(sizes)}; weights end at most "
        f"{found['largest_difference']:.1e} apart"
    )
    return "\n".join(lines)


def main():
    from absl import flags

    from experiments.benchmark import work

    options = flags.FLAGS
    out = pathlib.Path(options.out)
    if out.exists():
        raise ValueError(f"{out} exists; give a new --out.")
    found = measure(work.MODELS[options.model], options.shape, options.rounds, options.steps)
    out.parent.mkdir(parents=True, exist_ok=True)
    asked = dict(model=options.model, shape=options.shape, pairs=PAIRS)
    out.write_text(json.dumps(asked | found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    from absl import flags

    from dpo_jax import command_line
    from dpo_jax.parallel import processes

    flags.DEFINE_string("out", None, "File for the measurements.", required=True)
    flags.DEFINE_enum(
        "model",
        "gpt2-tiny",
        ["smoke", "gpt2-tiny", "gpt2"],
        "The model's sizes; its weights are random.",
    )
    flags.DEFINE_enum(
        "shape", "imdb", ["tldr", "imdb", "hh"], "The data set whose lengths rows have."
    )
    flags.DEFINE_integer("rounds", 5, "How often each way is measured.", lower_bound=1)
    flags.DEFINE_integer("steps", 2, "Steps of each policy per measurement.", lower_bound=1)
    processes.start()
    command_line.run(main, __doc__)
