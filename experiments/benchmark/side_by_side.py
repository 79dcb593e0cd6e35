"""K policies trained as one program against K programs one after the other.

    python -m experiments.benchmark.side_by_side --model=gpt2-tiny --shape=imdb --out=FILE.json

The policies have one model, batch and kept reference, and a β each: a sweep's points. "Side by
side" is our own train step under vmap over states and hyperparameters, "in turn" the same step once
a policy; both on one device, in turns, so that the host's load falls on both. Comes out: seconds in
which every policy makes a step, their ratio in each round, bytes of the programs' temporaries, and
how far the two ways' weights end from each other.
"""

import json
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

BETAS = (0.05, 0.1, 1.0, 5.0)
PAIRS = 8


def measure(model: dict, shape: str, rounds: int, steps: int) -> dict:
    """Both ways' seconds a step of all policies, round by round, and the largest difference of a
    weight at the end.
    """
    from experiments.benchmark import ours, work

    told = work.Work(pairs=PAIRS, steps=steps, cached=True, dtype="float32")
    with tempfile.TemporaryDirectory(prefix="dpo_jax_side_by_side_") as folder:
        folder = pathlib.Path(folder)
        work.write(folder, told, model, *work.lengths(shape, PAIRS * steps))
        trainer = ours.Trainer(folder, told)
    batches = [trainer.load(step) for step in range(steps)]
    hypers = [trainer.hyper | dict(beta=jnp.float32(beta)) for beta in BETAS]
    stacked_hyper = jax.tree.map(lambda *x: jnp.stack(x), *hypers)
    with jax.set_mesh(trainer.mesh):
        in_turn = [jax.tree.map(jnp.copy, trainer.state) for _ in BETAS]
        together = jax.tree.map(lambda *x: jnp.stack(x), *in_turn)
        one = trainer.programs.train_step
        every = jax.jit(jax.vmap(one.__wrapped__, in_axes=(0, None, 0, None)), donate_argnums=0)
        seconds = []
        for _ in range(1 + rounds):  # the first compiles
            began = time.perf_counter()
            for batch in batches:
                for k, hyper in enumerate(hypers):
                    in_turn[k], _ = one(in_turn[k], None, hyper, batch)
            jax.block_until_ready(in_turn)
            between = time.perf_counter()
            for batch in batches:
                together, _ = every(together, None, stacked_hyper, batch)
            jax.block_until_ready(together)
            seconds.append(((between - began) / steps, (time.perf_counter() - between) / steps))
        apart = max(
            float(jnp.abs(stack - jnp.stack(each)).max())
            for stack, *each in zip(
                *map(jax.tree.leaves, [together.params, *(state.params for state in in_turn)]),
                strict=True,
            )
        )
        temporaries = [
            program.lower(state, None, hyper, batches[0])
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
            for program, state, hyper in (
                (one, in_turn[0], hypers[0]),
                (every, together, stacked_hyper),
            )
        ]
    seconds = np.array(seconds[1:])
    return dict(
        policies=len(BETAS),
        in_turn=seconds[:, 0].tolist(),
        side_by_side=seconds[:, 1].tolist(),
        ratio=(seconds[:, 0] / seconds[:, 1]).tolist(),
        largest_difference=apart,
        temporary_bytes=dict(in_turn=temporaries[0], side_by_side=temporaries[1]),
    )


def table(found: dict) -> str:
    lines = [f"{found['policies']} policies, seconds in which each makes a step:"]
    for name in ("in_turn", "side_by_side", "ratio"):
        values = found[name]
        lines.append(
            f"{name.replace('_', ' '):<14}{statistics.median(values):>9.4f}"
            f"  ({min(values):.4f} to {max(values):.4f})"
        )
    sizes = ", ".join(
        f"{name.replace('_', ' ')} {size / 2**20:.0f} MiB"
        for name, size in found["temporary_bytes"].items()
    )
    return "\n".join(
        [
            *lines,
            f"temporaries: {sizes}; weights end at most {found['largest_difference']:.1e} apart",
        ]
    )


def main():
    from absl import flags

    from experiments.benchmark import work

    options = flags.FLAGS
    out = pathlib.Path(options.out)
    if out.exists():
        raise ValueError(f"{out} exists; give a new --out.")
    found = measure(work.MODELS[options.model], options.shape, options.rounds, options.steps)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps(dict(model=options.model, shape=options.shape, pairs=PAIRS) | found, indent=1)
        + "\n"
    )
    print(table(found))


if __name__ == "__main__":
    from absl import flags

    from dpo_jax import command_line
    from dpo_jax.parallel import processes

    flags.DEFINE_string("out", None, "The file for the measurements.", required=True)
    flags.DEFINE_enum(
        "model",
        "gpt2-tiny",
        ["smoke", "gpt2-tiny", "gpt2"],
        "The sizes of the model, which is random.",
    )
    flags.DEFINE_enum("shape", "imdb", ["tldr", "imdb", "hh"], "The rows' lengths.")
    flags.DEFINE_integer("rounds", 5, "Measurements of each way.", lower_bound=1)
    flags.DEFINE_integer("steps", 2, "Steps of every policy in a measurement.", lower_bound=1)
    processes.start()
    command_line.run(main, __doc__)
