"""What a benchmark found: checked losses, medians and spreads, as a table and JSON."""

import statistics

START = 0.693147  # log 2, every run's first loss
TOLERANCE = {"float32": 5e-4, "bfloat16": 3e-2}  # of a loss, nats


def check_losses(found: dict[str, list[float]], dtype: str) -> str:
    """A line to show; ValueError where the sides differ, or have not moved far enough from log 2 to
    tell.
    """
    (ours, losses), *others = found.items()
    tolerance, lines = TOLERANCE[dtype], [f"losses of {ours}: {_numbers(losses)}"]
    if max(abs(loss - START) for loss in losses) < 3 * tolerance:
        raise ValueError(
            f"{lines[0]}: they stay at log 2, so they cannot tell whether the sides do the same work."
        )
    for name, other in others:
        gaps = [abs(a - b) for a, b in zip(losses, other, strict=True)]
        lines.append(
            f"of {name}: {_numbers(other)}, {max(gaps):.1e} apart at most (tolerance {tolerance:g})"
        )
        if not all(gap <= tolerance for gap in gaps):  # nor is nan
            raise ValueError("the sides do not do the same work: " + "; ".join(lines))
    return "; ".join(lines)


def summary(
    rounds: dict[str, list[float]],
    *,
    pairs: int,
    tokens: list[int],
    flops: list[int],
    peak_bytes: dict[str, int],
    ceiling: float,
) -> dict:
    """The report's numbers, medians over rounds and [least, most].

    rounds: side -> seconds of each round, ours first. pairs of a round; tokens and FLOPs that its
    rows need.
    """
    found = {}
    for name, seconds in rounds.items():
        rates = dict(
            pairs_per_second=[pairs / s for s in seconds],
            tokens_per_second=[t / s for t, s in zip(tokens, seconds, strict=True)],
            model_flops_per_second=[f / s for f, s in zip(flops, seconds, strict=True)],
        )
        rates["ceiling_share"] = [rate / ceiling for rate in rates["model_flops_per_second"]]
        found[name] = {rate: statistics.median(values) for rate, values in rates.items()}
        found[name] |= dict(
            peak_bytes=peak_bytes[name],
            spread={rate: [min(values), max(values)] for rate, values in rates.items()},
        )
    ours, *others = rounds
    if others:
        ratios = [
            b / a for a, b in zip(rounds[ours], rounds[others[0]], strict=True)
        ]  # of the same round
        found |= dict(
            ratio=statistics.median(ratios),
            ratio_spread=[min(ratios), max(ratios)],
            memory_ratio=peak_bytes[ours] / peak_bytes[others[0]],
        )
    return found


def table(found: dict, sides: list[str]) -> str:
    """The numbers for a person: median (least to most)."""
    columns = {
        "pairs/s": ("pairs_per_second", 1),
        "real tokens/s": ("tokens_per_second", 1),
        "model GFLOP/s": ("model_flops_per_second", 1e-9),
        "share of ceiling": ("ceiling_share", 1),
    }
    lines = [f"{'':<8}" + "".join(f"{title:>34}" for title in columns) + f"{'peak memory':>14}"]
    for side in sides:
        values, cells = found[side], []
        for name, scale in columns.values():
            least, most = values["spread"][name]
            cells.append(f"{values[name] * scale:.3g} ({least * scale:.3g} to {most * scale:.3g})")
        memory = f"{values['peak_bytes'] / 2**30:.2f} GiB"
        lines.append(f"{side:<8}" + "".join(f"{cell:>34}" for cell in cells) + f"{memory:>14}")
    if "ratio" in found:
        least, most = found["ratio_spread"]
        lines.append(
            f"{sides[0]} makes {found['ratio']:.2f} ({least:.2f} to {most:.2f}) times the pairs of {sides[1]} "
            f"with {found['memory_ratio']:.2f} of its memory"
        )
    return "\n".join(lines)


def _numbers(values) -> str:
    return ", ".join(f"{value:.5f}" for value in values)
