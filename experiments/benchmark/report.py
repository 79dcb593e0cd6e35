"""Check the losses of a benchmark's sides, and report medians and spreads as a table and JSON."""

import statistics

START = 0.693147  # log 2, every run's first loss
TOLERANCE = {"float32": 5e-4, "bfloat16": 1e-2}  # between two sides' losses, in nats


def check_losses(found: dict[str, list[float]], dtype: str) -> str:
    """Return a line that compares the sides' losses.

    found: side -> losses of the same steps, ours first. Raises ValueError if the sides differ, or
    if the losses have not moved far enough from log 2 to tell.
    """
    (ours, losses), *others = found.items()
    tolerance = TOLERANCE[dtype]
    lines = [f"losses of {ours}: {_numbers(losses)}"]
    if max(abs(loss - START) for loss in losses) < 3 * tolerance:
        raise ValueError(
            f"{lines[0]}: they stay at log 2, so they cannot tell whether the sides do the same "
            "work."
        )
    for name, other in others:
        gaps = [abs(a - b) for a, b in zip(losses, other, strict=True)]
        lines.append(
            f"of {name}: {_numbers(other)}, {max(gaps):.1e} apart at most (tolerance {tolerance:g})"
        )
        agree = all(gap <= tolerance for gap in gaps)  # false for nan
        if not agree:
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
    """Return the report's numbers: medians over rounds, with [least, most].

    rounds: side -> seconds of each round, ours first. pairs: in each round. tokens, flops: what the
    rows of each round need. ceiling: FLOP/s that the machine can reach. "ratios" has, for each
    other side, how many times its pairs/s ours are, and our share of its memory.
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
        spread = {rate: [min(values), max(values)] for rate, values in rates.items()}
        found[name] |= dict(peak_bytes=peak_bytes[name], spread=spread)

    ours, *others = rounds
    found["ratios"] = {}
    for name in others:
        # Within a round, as the machine's load differs between rounds.
        ratios = [theirs / own for own, theirs in zip(rounds[ours], rounds[name], strict=True)]
        found["ratios"][name] = dict(
            pairs_per_second=statistics.median(ratios),
            spread=[min(ratios), max(ratios)],
            peak_bytes=peak_bytes[ours] / peak_bytes[name],
        )
    return found


def table(found: dict, sides: list[str]) -> str:
    """Return the numbers as a table: median (least to most)."""
    # Title -> (rate, unit).
    columns = {
        "pairs/s": ("pairs_per_second", 1),
        "real tokens/s": ("tokens_per_second", 1),
        "model GFLOP/s": ("model_flops_per_second", 1e-9),
        "share of ceiling": ("ceiling_share", 1),
    }
    titles = "".join(f"{title:>34}" for title in columns)
    lines = [f"{'':<8}{titles}{'peak memory':>14}"]
    for side in sides:
        values = found[side]
        line = f"{side:<8}"
        for rate, scale in columns.values():
            least, most = values["spread"][rate]
            cell = f"{values[rate] * scale:.3g} ({least * scale:.3g} to {most * scale:.3g})"
            line += f"{cell:>34}"
        memory = f"{values['peak_bytes'] / 2**30:.2f} GiB"
        lines.append(f"{line}{memory:>14}")
    for name, ratio in found["ratios"].items():
        least, most = ratio["spread"]
        lines.append(
            f"{sides[0]} makes {ratio['pairs_per_second']:.2f} ({least:.2f} to {most:.2f}) times "
            f"the pairs of {name} with {ratio['peak_bytes']:.2f} of its memory"
        )
    return "\n".join(lines)


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.5f}" for value in values)
