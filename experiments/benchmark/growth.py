"""How a step's cost grows with its pairs and its rows' length: python -m
experiments.benchmark.growth --out=DIR

One run of our trainer for each point, one after the other, on the benchmark's model (gpt2-tiny
unless --model says otherwise) with positions for the longest row. All rows of a point have one
length, three quarters of it prompt. Along one line the length stays and pairs are added; along the
other the tokens of a step stay, so that rows grow longer and fewer: what is linear in tokens is
flat there. Comes out: DIR/growth.json, a row per point, DIR/growth.png, and a table.
"""

import json
import pathlib
import statistics
import tempfile

import numpy as np

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)  # tokens of prompt + response
PAIRS = (1, 2, 4, 8, 16)
LENGTH = 512  # of the rows to which pairs are added
STEPS = 3  # timed at each point


def points() -> list[tuple[str, int, int]]:
    """(line, pairs of a step, tokens of a row)."""
    along = [("length", max(LENGTHS) // length, length) for length in LENGTHS]
    return along + [("pairs", pairs, LENGTH) for pairs in PAIRS]


def measure(model: dict, pairs: int, length: int, dtype: str) -> dict:
    """Median, least and most seconds of a step, and the tokens and FLOPs that its rows need."""
    from experiments.benchmark import ours, work

    told = work.Work(pairs=pairs, steps=STEPS, cached=False, dtype=dtype)
    prompt_P, response_P2 = (
        np.full(pairs * STEPS, length * 3 // 4),
        np.full((pairs * STEPS, 2), length // 4),
    )
    with tempfile.TemporaryDirectory(prefix="dpo_jax_growth_") as folder:
        folder = pathlib.Path(folder)
        work.write(folder, told, model | dict(n_positions=max(LENGTHS)), prompt_P, response_P2)
        trainer = ours.Trainer(folder, told)
        found = [trainer.steps(1) for _ in range(STEPS)]
    seconds = [step["seconds"] for step in found]
    return dict(
        pairs=pairs,
        length=length,
        tokens=found[0]["tokens"],
        flops=found[0]["flops"],
        seconds=statistics.median(seconds),
        least=min(seconds),
        most=max(seconds),
    )


def table(rows: list[dict]) -> str:
    heads = f"{'':<8}{'pairs':>6}{'row':>7}{'tokens':>8}{'s a step':>10}{'ms/pair':>11}{'ms/token':>12}{'GFLOP/s':>9}"
    return "\n".join(
        [heads]
        + [
            f"{row['line']:<8}{row['pairs']:>6}{row['length']:>7}{row['tokens']:>8}{row['seconds']:>10.3f}"
            f"{1e3 * row['seconds'] / row['pairs']:>11.1f}{1e3 * row['seconds'] / row['tokens']:>12.3f}"
            f"{row['flops'] / row['seconds'] / 1e9:>9.0f}"
            for row in rows
        ]
    )


def draw(path, rows: list[dict], title: str) -> None:
    """Seconds of a step against its pairs, milliseconds of a token against its row's length;
    dashed: by FLOPs alone.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    figure.suptitle(title)
    pairs, length = ([row for row in rows if row["line"] == line] for line in ("pairs", "length"))
    axes = figure.add_subplot(
        1, 2, 1, xlabel="pairs a step", ylabel=f"seconds a step, rows of {LENGTH} tokens"
    )
    _draw_line(axes, [row["pairs"] for row in pairs], pairs, np.ones(len(pairs)))
    axes.set_yscale("log", base=2)
    axes = figure.add_subplot(1, 2, 2, xlabel="tokens of a row", ylabel="milliseconds a token")
    _draw_line(
        axes,
        [row["length"] for row in length],
        length,
        np.array([1e3 / row["tokens"] for row in length]),
    )
    axes.set_ylim(0, 1.3 * axes.dataLim.ymax)
    figure.savefig(path)


def _draw_line(axes, xs: list[int], rows: list[dict], scale) -> None:
    """The rows' seconds times `scale`, and what their FLOPs would take at the rate of the middle
    one.
    """
    names = ("seconds", "least", "most", "flops")
    seconds, least, most, flops = (scale * [row[name] for row in rows] for name in names)
    middle = len(rows) // 2
    axes.fill_between(xs, least, most, alpha=0.2)
    axes.plot(xs, seconds, marker="o", label="measured (median; band: least to most)")
    axes.plot(
        xs,
        flops * seconds[middle] / flops[middle],
        "--",
        color="black",
        linewidth=1,
        label=f"its FLOPs, at the rate of {xs[middle]}",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(xs, [str(value) for value in xs])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def main():
    from absl import flags

    from experiments.benchmark import work

    options = flags.FLAGS
    out = pathlib.Path(options.out)
    if (out / "growth.json").exists():
        raise ValueError(f"{out / 'growth.json'} exists; give a new --out.")
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for line, pairs, length in points():
        rows.append(
            dict(line=line) | measure(work.MODELS[options.model], pairs, length, options.dtype)
        )
        print(
            f"{len(rows)}/{len(points())}  {pairs} pairs of {length}-token rows: {rows[-1]['seconds']:.3f} s",
            flush=True,
        )
    (out / "growth.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(
        out / "growth.png", rows, f"a DPO step of {options.model}, {options.dtype}, live reference"
    )
    print(table(rows))


if __name__ == "__main__":
    from absl import flags

    from dpo_jax import command_line
    from dpo_jax.parallel import processes

    flags.DEFINE_string("out", None, "The folder for growth.json and growth.png.", required=True)
    flags.DEFINE_enum(
        "model",
        "gpt2-tiny",
        ["smoke", "gpt2-tiny", "gpt2"],
        "The sizes of the model, which is random.",
    )
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "What it computes in.")
    processes.start()
    command_line.run(main, __doc__)
