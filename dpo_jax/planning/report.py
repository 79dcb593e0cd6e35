"""The report of a plan, and its tables for a person."""

import dataclasses

from dpo_jax.data.batches import is_sharing_lost
from dpo_jax.parallel.sharding import shown_axes, told
from dpo_jax.planning import roofline
from dpo_jax.stage_table import STAGES


@dataclasses.dataclass(frozen=True)
class Advice:
    """The flags that make a stage fit, or all that were tried where none do."""

    fits: bool
    flags: str
    tries: list[dict]  # flags, fits, hbm_gib_per_chip of each attempt, in order


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """Flags that let the pairs of a prompt share more."""

    flags: str
    tokens_per_pair: float  # that the cells compute now, with their padding
    then: float  # and with the flags
    tokens: float  # that a step reads then


@dataclasses.dataclass(frozen=True)
class Sharing:
    """The tokens of a step: what the pairs of a prompt share on a mesh, and what is lost."""

    tokens: float  # that are read
    apart: float  # that would be, one pair at a time
    whole: float  # that would be if a batch were a single cell
    computed: int  # with the padding of all cells
    pairs_together: int  # pairs of a prompt that follow each other in the order of the data
    cells: int  # microbatches x shards
    suggestions: list[Suggestion] = dataclasses.field(default_factory=list)

    @property
    def is_lost(self) -> bool:
        """Whether cells read notably more than one cell would."""
        return is_sharing_lost(self.tokens, self.apart, self.whole)


@dataclasses.dataclass(frozen=True)
class Report:
    """The cost of a stage on a topology.

    Times come from the roofline, so they are the least possible. A program that does not fit has
    no times: its `seconds` and `collectives` are None.
    """

    stage: str
    topology: str
    chips: int
    mesh: dict[str, int]
    parameters: int
    dtype: str
    batch_size: int
    microbatches: int
    prompt_tokens: int
    response_tokens: int
    pairs_per_prompt: int
    responses_per_prompt: int
    sharing: Sharing
    compiled: bool  # by the chip's compiler; otherwise estimated from the sizes
    capacity_gib: float  # memory of a chip
    hbm_gib: dict[str, float]  # memory of a chip that is taken during a step, by kind
    flops_per_step: float  # that the program does, over all chips
    needed_flops_per_step: float  # that the model needs, without recomputation or padding
    collectives: dict[str, dict] | None  # kind -> count and GiB received by a chip
    seconds: dict[str, float] | None  # part of roofline.PARTS -> least time of a step
    steps: int = 0  # of the whole stage; 0 if neither the config nor the data tells
    hours: float | None = None
    # Of PPO: what a step does, one after the other -> part of roofline.PARTS -> least time. The
    # fields above are then sums over them.
    phases: dict[str, dict[str, float]] | None = None
    updates_per_step: int = 1
    counts_reward: bool = True  # in the work and the memory; of PPO
    missing_compiler: str = ""  # what to install, where the numbers are estimated for lack of it
    advice: Advice | None = None
    # A line for each axis of the mesh that leaves weights whole, as sharding.unsplit has them.
    unsplit: list[str] = dataclasses.field(default_factory=list)

    @property
    def hbm_gib_per_chip(self) -> float:
        return sum(self.hbm_gib.values())

    @property
    def fits(self) -> bool:
        return self.hbm_gib_per_chip <= self.capacity_gib

    @property
    def step_seconds(self) -> float | None:
        """The least time of a step whose parts overlap perfectly; its phases do not."""
        if self.phases:
            return sum(max(seconds.values()) for seconds in self.phases.values())
        return max(self.seconds.values()) if self.seconds else None

    @property
    def step_seconds_without_overlap(self) -> float | None:
        return sum(self.seconds.values()) if self.seconds else None

    @property
    def bottleneck(self) -> str | None:
        """The part of roofline.PARTS that takes longest."""
        return max(self.seconds, key=self.seconds.get) if self.seconds else None

    @property
    def chip_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.chips

    def to_dict(self) -> dict:
        """Return the report as plain values, as `--json` prints it."""
        derived = (
            "hbm_gib_per_chip",
            "fits",
            "step_seconds",
            "step_seconds_without_overlap",
            "bottleneck",
            "chip_hours",
        )
        values = dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}
        for name in ("advice", "unsplit", "phases"):
            if not values[name]:
                del values[name]
        if self.updates_per_step == 1:
            del values["updates_per_step"]
        if self.counts_reward:
            del values["counts_reward"]
        return values


def table(report: Report) -> str:
    """Return the report as lines for a person."""
    lines = [*_header(report), *_tokens(report), "", *_memory(report), "", *_work(report)]
    if report.advice:
        lines += ["", *_advice(report.advice)]
    if report.seconds:
        lines += ["", *_times(report)]
    return "\n".join(lines)


def _header(report: Report) -> list[str]:
    examples = f"{report.batch_size} examples a step"
    if STAGES[report.stage].samples:
        examples = (
            f"{report.batch_size} completions a step, {report.updates_per_step} updates, each"
        )
    return [
        f"{report.stage} of {report.parameters / 1e9:.2f} billion parameters in {report.dtype} "
        f"on {report.topology}, {report.chips} chips: {told(report.mesh)}",
        f"{examples} in {_count(report.microbatches, 'microbatch')}; "
        f"assumed: prompts of {report.prompt_tokens} tokens, responses of {report.response_tokens},"
        f" {_responses_of_prompt(report)}",
    ]


def _responses_of_prompt(report: Report) -> str:
    examples = _count(report.pairs_per_prompt, _example(report))
    if STAGES[report.stage].responses == 2:
        return f"{examples} of {report.responses_per_prompt} responses a prompt"
    if report.pairs_per_prompt == 1:
        return "1 response a prompt"
    # The chosen responses of pairs: those of the same response are rows of their own.
    return f"{examples} of single responses a prompt"


def _example(report: Report) -> str:
    """Return the name of an example: "pair", or "row" where it has a single response."""
    return "pair" if STAGES[report.stage].responses == 2 else "row"


def _tokens(report: Report) -> list[str]:
    sharing = report.sharing
    example = _example(report)
    line = (
        f"reads {sharing.tokens:,.0f} tokens a step; one {example} at a time {sharing.apart:,.0f}"
    )
    if STAGES[report.stage].samples:
        # Nothing is shared, as each completion has a prompt of its own.
        line = f"an update reads {sharing.tokens:,.0f} tokens"
    lines = [line]
    if sharing.pairs_together < report.pairs_per_prompt:
        if sharing.pairs_together == 1:
            apart = f"the {example}s of a prompt are shuffled apart, so they share nothing"
        else:
            apart = (
                f"no more than {sharing.pairs_together} {example}s of a prompt stay together "
                "(config.data.group_pairs), so no more share it"
            )
        lines.append(apart)
    if sharing.suggestions and sharing.pairs_together > 1:
        room = report.batch_size / sharing.cells
        lines.append(
            f"each of {sharing.cells} cells (shard x microbatch) has room for "
            f"{room:g} {example if room == 1 else example + 's'}, but "
            f"{sharing.pairs_together} of a prompt belong together, so"
        )
        if sharing.is_lost:
            lines.append(
                f"  sharing is lost: if all {example}s of a step were in one cell, "
                f"{sharing.whole:,.0f} tokens would be read"
            )
        else:
            lines.append(
                "  cells are uneven, and wait for the fullest: with padding a step takes "
                f"{sharing.computed:,} tokens"
            )
    if sharing.suggestions:
        lines.append(f"to make a {example} less work:")
    for suggestion in sharing.suggestions:
        lines.append(
            f"  {suggestion.flags}  (reads {suggestion.tokens:,.0f} tokens a step; with padding "
            f"{suggestion.then:,.0f} a {example} instead of {suggestion.tokens_per_pair:,.0f})"
        )
    return lines


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('ch') else 's'}"


def _memory(report: Report) -> list[str]:
    room = report.capacity_gib - report.hbm_gib_per_chip
    verdict = f"fits, {room:.2f} to spare" if room >= 0 else f"does NOT fit, {-room:.2f} too much"
    lines = ["memory of a chip, GiB"]
    if not report.compiled:
        lines = [f"all numbers are estimated from sizes, as {report.missing_compiler}"]
        lines.append("memory of a chip, GiB (estimated, not compiled)")
    for kind, size in report.hbm_gib.items():
        lines.append(f"  {kind:<24}{size:10.2f}")
    total = f"{report.hbm_gib_per_chip:10.2f}  of {report.capacity_gib:.2f}"
    lines.append(f"  {'total':<24}{total}: {verdict}")
    return lines + report.unsplit


def _work(report: Report) -> list[str]:
    needed = report.needed_flops_per_step / report.flops_per_step
    lines = [f"one step: {report.flops_per_step:.3g} FLOPs; the model needs {needed:.0%} of them"]
    for kind, received in (report.collectives or {}).items():
        line = f"  {kind:<24}{received['gib']:10.2f} GiB received by a chip"
        if received["count"]:
            line += f", in {received['count']}"
        lines.append(line)
    if not report.counts_reward:
        lines.append("  reward: not counted, neither its work nor its memory")
    return lines


def _advice(advice: Advice) -> list[str]:
    if advice.fits:
        heading = "to make it fit, add:"
    else:
        heading = "these flags are not enough; take more chips:"
    if advice.tries:
        needed = f"({advice.tries[-1]['hbm_gib_per_chip']:.2f} GiB a chip)"
    else:
        needed = "(nothing is left to try)"
    return [heading, f"  {advice.flags}", f"  {needed}"]


def _times(report: Report) -> list[str]:
    lines = ["least time, seconds a step"]
    for phase, seconds in (report.phases or {}).items():
        part = max(seconds, key=seconds.get)
        lines.append(f"  {phase:<24}{seconds[part]:10.4f}  limited by {roofline.PARTS[part]}")
    for part, value in report.seconds.items():
        mark = "  <- bottleneck" if part == report.bottleneck else ""
        lines.append(f"  {roofline.PARTS[part]:<24}{value:10.4f}{mark}")
    lines.append(
        f"  {'total':<24}{report.step_seconds:10.4f}  with perfect overlap; "
        f"{report.step_seconds_without_overlap:.4f} with none"
    )
    if report.steps:
        lines.append(
            f"{report.steps} steps: at least {report.hours:.2f} hours, "
            f"{report.chip_hours:.1f} chip-hours, without evaluations and checkpoints"
        )
    else:
        lines.append("hours: not known, as the config does not tell the steps; add --rows=N")
    return lines


def sweep_table(reports: list[Report]) -> str:
    """Return mesh shapes side by side: those that fit first, the fastest on top."""
    axes = shown_axes(reports[0].mesh)
    lines = [f"{' '.join(axes)}      GiB a chip  fits    s a step  bottleneck"]
    for report in sorted(reports, key=lambda r: (not r.fits, r.step_seconds or 0)):
        shape = " ".join(f"{report.mesh[axis]:>{len(axis)}}" for axis in axes)
        fits = "yes" if report.fits else "no"
        line = f"{shape}  {report.hbm_gib_per_chip:>14.2f}  {fits:<4}"
        if report.seconds:
            line += f"{report.step_seconds:>12.4f}  {report.bottleneck}"
        lines.append(line)
    return "\n".join(lines)
