"""Look at a data set before training on it: dpo-jax data PATH [--model=DIR_OR_HUB_NAME]

Shows what PATH was recognised as, what became of every row, how long prompts and responses are, how
many rows a prompt has, what is there twice, what a cut to a length would cost, a few rows with the
tokens that are trained on between ⟦ and ⟧, and the command to train with. Rows are read and
tokenised by the code that trains. Without a model, lengths are in characters. Needs no device.

--config=NAME shows what a run with that config reads; --config.data.FIELD=VALUE works as in
training, and the usual fields have a flag of their own: --source=hh, --max_length=1024.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import sys
import textwrap
from collections.abc import Sequence

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from dpo_jax import command_line, config_checks, config_files, stage_table
from dpo_jax import config as configs
from dpo_jax.data import batches, dataset, leaks, survey, toy
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.data.ledger import CHAT_LINES, Counts
from dpo_jax.data.survey import Cut, Piece, ShownRow, Survey
from dpo_jax.stage_table import STAGES
from dpo_jax.whole_file import whole_file

# The stage that trains on rows of a kind, and its config.
STAGE_OF = {"pairs": "dpo", "unpaired": "kto", "sft": "sft"}
KINDS = ("auto", *STAGE_OF)
CALLED = {"pairs": "preference pairs", "unpaired": "labelled completions", "sft": "completions"}
# Fields of config.data that have a flag of their own.
FIELDS = (
    *("source", "columns", "weight", "margin", "ignore", "turns", "mix", "on_bad_row"),
    *("train_split", "eval_split", "max_rows"),
    *("max_length", "max_prompt_length", "truncate"),
)
# Counts by reason, as the report calls them: label -> field of Counts.
KEYED = {"recognised as": "shapes", "left out": "filtered", "dropped": "dropped"}
FEW_CUT = 0.05  # a share of rows that may be cut for the sake of shorter rows
LENGTH_BIAS = 0.2  # a difference of mean lengths, as a share, that is worth a warning
MANY_REPEATED = 0.05  # a share of training rows that is worth a warning
MANY = 0.5  # a share of rows that is worth a warning if they are cut

WIDTH = 100  # of the report, in characters
HEIGHTS = " ▁▂▃▄▅▆▇█"  # of a histogram's columns
COLUMNS = 32  # of a histogram
BAR = 30  # characters of the longest bar
GROUPS = ((1, 1), (2, 2), (3, 5), (6, None))  # of prompts, by how many rows they have
SHOWN_START, SHOWN_END = 300, 200  # characters that are shown of a longer text
# Other control characters than tab and newline, as a terminal would obey them: their pictures.
VISIBLE = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
PROGRESS_EVERY = 1000  # rows
BOLD, GREEN, DIM, PLAIN = "\033[1m", "\033[32m", "\033[2m", "\033[0m"


# ---- the report


@dataclasses.dataclass(frozen=True)
class Advice:
    """What to type, and what to know before."""

    command: list[str]  # the words of a command line
    reasons: list[str]
    warnings: list[str]


class Style:
    """How text is set off: in colours on a terminal, and plain elsewhere."""

    def __init__(self, has_colours: bool):
        self._has_colours = has_colours

    def heading(self, text: str) -> str:
        return self._colour(BOLD, text)

    def aside(self, text: str) -> str:
        return self._colour(DIM, text)

    def marked(self, text: str) -> str:
        """Return a text that is trained on, between its marks."""
        return self._colour(GREEN, f"⟦{text}⟧")

    def _colour(self, code: str, text: str) -> str:
        return f"{code}{text}{PLAIN}" if self._has_colours else text


def report(
    found: Survey,
    title: str,
    advice: Advice,
    style: Style,
    leaked: Sequence[leaks.Leak] = (),
) -> str:
    """Return the report as text.

    leaked: of a run with several data sets, the held-out prompts of each that any stage trains on.
    """
    blocks = [
        [style.heading(title), *_splits(found)],
        _sets(found, style),
        _rows(found, style),
        _lengths(found, style),
        _prompts(found, style),
        _repeats(found, style),
        leaks.table(leaked).splitlines(),
        _cuts(found, style),
        *[_shown(row, style) for row in found.rows],
        [style.heading("To train on it"), *_command(advice.command), *_notes(advice.reasons)],
        [line for warning in advice.warnings for line in _wrapped(f"warning: {warning}")],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _sets(found: Survey, style: Style) -> list[str]:
    """Return the table of the sets of a mixture; nothing where there is one set."""
    rows = []
    for name, ledger in found.ledger.parts.items():
        counts = [ledger.train.kept, ledger.train.not_drawn, ledger.eval.kept, ledger.test.kept]
        rows.append([name, *map(_number, counts)])
    headings = ["Sets", "trained on", "not drawn", "validated on", "tested on"]
    return _table(headings, rows, style) if rows else []


def _splits(found: Survey) -> list[str]:
    """Return the line that says what each split is used for; nothing in a mixture."""
    if not found.uses:
        return []
    says = {"train": "trained on", "eval": "validated on", "test": "tested on", "": "not used"}
    if found.ledger.eval.held_out:
        says["eval"] = "validated and tested on, different prompts"
    uses = [f"{split} ({says[use]})" for split, use in found.uses.items()]
    if found.ledger.train.held_out:
        uses.append("a part of its prompts is held out to validate and test on")
    elif "eval" not in found.uses.values():
        uses.append("nothing is held out to evaluate on")
    return ["splits: " + ", ".join(uses)]


def _rows(found: Survey, style: Style) -> list[str]:
    """Return the table of what became of the rows."""
    by_split = found.ledger.by_split()

    def of_each(name: str) -> list:
        return [getattr(counts, name) for counts in by_split.values()]

    def by_key(label: str, name: str) -> list[tuple]:
        found = of_each(name)
        # Each once, in the order in which the splits have them.
        keys = dict.fromkeys(key for of_split in found for key in of_split)
        return [(f"  {label}{key}", *(of_split.get(key, 0) for of_split in found)) for key in keys]

    lines = [("read", *of_each("read"))]
    if any(of_each("further_pairs")):
        lines.append((found.ledger.further, *of_each("further_pairs")))
    for label, name in KEYED.items():
        lines += by_key(f"{label}: ", name)
    held_out = of_each("held_out")
    if any(held_out):
        lines.append(("  held out", *(count or "" for count in held_out)))
    if any(of_each("not_drawn")):
        lines.append(("  not drawn", *of_each("not_drawn")))
    lines.append(("kept", *of_each("kept")))
    lines += by_key("", "labels")
    lines += by_key("subset ", "subsets")
    if any(of_each("prompts")):
        lines.append(("prompts", *of_each("prompts")))
    for label, name in CHAT_LINES.items():
        if any(of_each(name)):
            lines.append((f"  {label}", *of_each(name)))
    for label, name in (("weights", "weights"), ("target margins", "margins")):
        for label_of_part, *values in by_key(f"{label}, ", name):
            lines.append((label_of_part, *(f"{value:.6g}" for value in values)))
    table = _table(["Rows", *by_split], [[*map(_number, line)] for line in lines], style)
    for counts in by_split.values():
        for line in counts.drops():
            table += _wrapped(f"dropped: {line}")
    return table


def _lengths(found: Survey, style: Style) -> list[str]:
    """Return a histogram of each part's lengths, with one axis, and the mean difference."""
    # One axis for all parts, so that they can be compared. A few very long rows must not squeeze
    # the others into one column: the last column stands for all that is beyond the axis.
    everything = np.concatenate(list(found.lengths.values()))
    end = _axis_end(float(np.quantile(everything, 0.99)))
    beyond = "+" if everything.max() > end else ""
    axis = f"0{f'{end:,}{beyond}':>{COLUMNS - 1}}"
    headings = [f"Lengths, {found.unit}", axis, "median", "95 %", "longest"]
    rows = []
    for part, lengths in found.lengths.items():
        numbers = [np.median(lengths), np.quantile(lengths, 0.95), lengths.max()]
        rows.append(
            [part, histogram(lengths, end), *[_number(round(number)) for number in numbers]]
        )
    table = _table(headings, rows, style)
    # In answers of several turns, what users and tools say is read, but not trained on.
    trained_on = sum(int(lengths.sum()) for lengths in found.trained_on.values())
    share = trained_on / sum(int(found.lengths[part].sum()) for part in found.trained_on)
    if share < 1:
        table += _wrapped(
            f"{_share(share)} of the tokens of the responses are trained on; the others are turns "
            "of users and tools"
        )
    if found.kind == "pairs":
        chosen, rejected = found.trained_on["chosen"], found.trained_on["rejected"]
        table += _wrapped(
            f"chosen minus rejected: {np.mean(chosen - rejected):+,.1f} {found.unit} trained on, "
            f"on average; chosen is the longer one in {_share(np.mean(chosen > rejected))} of the "
            f"pairs, the shorter one in {_share(np.mean(chosen < rejected))}"
        )
    return table


def histogram(lengths: np.ndarray, end: int) -> str:
    """Return a text of COLUMNS blocks: how many lengths are in each part of 0 to `end`.

    The last block has all that are longer, too.
    """
    column_P = np.minimum(lengths * COLUMNS // end, COLUMNS - 1)
    counts = np.bincount(column_P, minlength=COLUMNS)
    # A column that is not empty is never invisible.
    heights = np.ceil(counts / counts.max() * (len(HEIGHTS) - 1)).astype(int)
    return "".join(HEIGHTS[height] for height in heights)


def _axis_end(length: float) -> int:
    """Return a round number that is at least as large, and at least COLUMNS."""
    end = COLUMNS
    while end < length:
        end *= 2
    # Three quarters are round enough, too, and leave less of the axis empty.
    return end * 3 // 4 if end > COLUMNS and end * 3 // 4 >= length else end


def _prompts(found: Survey, style: Style) -> list[str]:
    """Return how many prompts have how many rows."""
    counts = found.rows_per_prompt
    noun = "pairs" if found.kind == "pairs" else "completions"
    if not len(counts):
        return ["the rows have no prompts"]
    if counts.max() == 1:
        return [f"{_plural(len(counts), 'prompt')}, each with one row"]
    groups = []
    for least, most in GROUPS:
        has = (counts >= least) & (counts <= (most or counts.max()))
        label = f"{least} or more" if most is None else f"{least} to {most}"
        if has.any():
            groups.append((str(least) if least == most else label, int(has.sum())))
    largest = max(prompts for _, prompts in groups)
    rows = []
    for label, prompts in groups:
        # Rounded up: a group that is not empty has a bar.
        bar = "█" * -(-prompts * BAR // largest)
        rows.append([f"  {label}", _number(prompts), bar])
    table = _table([f"{noun.capitalize()} of a prompt", "prompts", ""], rows, style)
    table.append(f"{len(counts):,} prompts have {counts.sum():,} {noun}, {counts.max():,} at most")
    return table


def _repeats(found: Survey, style: Style) -> list[str]:
    """Return the table of what is there more than once."""
    repeats = found.repeats
    if not any(dataclasses.astuple(repeats)):
        return ["no held-out prompt is trained on, and no training row is there twice or reversed"]
    train = found.ledger.train.kept
    held_out = (
        (
            "validation",
            found.ledger.eval.kept,
            repeats.eval_prompts_in_train,
            repeats.eval_prompts_nearly_in_train,
        ),
        (
            "test",
            found.ledger.test.kept,
            repeats.test_prompts_in_train,
            repeats.test_prompts_nearly_in_train,
        ),
    )
    are = "whose prompt is" if len(found.rows_per_prompt) else "that are"
    rows = []
    for split, count, exactly, nearly in held_out:
        if count:
            rows += [
                [f"{split} rows {are} trained on", _of(exactly, count)],
                ["  the same, but for case, white space and Unicode form", _of(nearly, count)],
            ]
    rows.append(["training rows equal to an earlier one", _of(repeats.train_rows_repeated, train)])
    if found.kind == "pairs":
        label = "training pairs that are there the other way round, too"
        rows.append([label, _of(repeats.train_pairs_reversed, train)])
    return _table(["Repeats", "rows"], rows, style)


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,} ({_share(count / total)})" if count else "none"


def _cuts(found: Survey, style: Style) -> list[str]:
    """Return the table of what a cut to each length costs."""
    if not found.cuts:
        return _wrapped(
            "Pass --model=DIR_OR_HUB_NAME to see tokens: lengths in tokens, what a cut costs, and "
            "rows as the model reads them."
        )
    # They are in ascending order: where the shortest cuts nothing, none does.
    shortest = found.cuts[0]
    if not shortest.rows:
        return [f"no row is longer than {shortest.max_length} tokens: nothing is cut"]
    rows = []
    for cut in found.cuts:
        rows.append(
            [
                f"{cut.max_length} (prompt {cut.max_prompt_length})",
                _with_share(cut.rows, cut.share_of_rows),
                _number(cut.prompts),
                _with_share(cut.responses, cut.share_of_responses),
                _with_share(cut.tokens, cut.share_of_tokens),
            ]
        )
    headings = ["Cut to max_length", "rows cut", "prompts", "responses, no EOS", "tokens lost"]
    table = _table(headings, rows, style)
    stays = {
        "keep_start": "the beginning of the prompt stays",
        "keep_end": "the end of the prompt stays",
        "keep_cue": "the beginning and the last few tokens of the prompt stay",
    }
    kept = [f"{stays[truncate]} (data.truncate={truncate})" for truncate in found.truncate]
    table += _wrapped(
        "where a row is longer, its prompt is cut to the length in brackets, then the responses; "
        + ", or ".join(kept)
    )
    return table


def _with_share(count: int, share: float) -> str:
    return f"{count:,} ({_share(share)})" if count else "0"


def _shown(row: ShownRow, style: Style) -> list[str]:
    """Return a row's parts, with what is trained on between marks."""
    lines = [style.heading(row.where + dataset.shown_numbers(row.numbers))]
    for part, pieces in row.parts.items():
        label = part
        if row.tokens:
            what = "" if part == "prompt" else " trained on"
            label += f", {_plural(row.tokens[part], 'token')}{what}"
        lines.append(style.aside(f"--- {label}"))
        lines.append("".join(_piece(piece, style) for piece in pieces))
    return lines


def _piece(piece: Piece, style: Style) -> str:
    """Return a piece's text, with the middle left out where it is long."""
    text = piece.text.translate(VISIBLE).encode("utf-8", "replace").decode()
    left_out = len(text) - SHOWN_START - SHOWN_END
    if left_out > 0:
        note = style.aside(f" [... {left_out:,} characters ...] ")
        text = text[:SHOWN_START] + note + text[-SHOWN_END:]
    return style.marked(text) if piece.is_trained_on else text


def _notes(texts: list[str]) -> list[str]:
    """Return the lines of notes, each indented."""
    lines = []
    for text in texts:
        lines += textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
    return lines


def _wrapped(text: str) -> list[str]:
    """Return a text as lines of at most WIDTH, all but the first indented."""
    lines = []
    for line in text.splitlines():
        own = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(
            line,
            WIDTH,
            initial_indent="  " if lines and not own else "",
            subsequent_indent=f"{own}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _command(words: list[str]) -> list[str]:
    """Return a command line, broken where it is too long."""
    lines = []
    line = ""
    for word in words:
        if line and len(line) + len(word) > WIDTH - 4:
            lines.append(f"{line} \\")
            line = "   "
        line = f"{line} {word}" if line else word
    return [*lines, line]


def _table(headings: list[str], rows: list[list[str]], style: Style) -> list[str]:
    """Return aligned lines: the first column and histograms to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = []
    for cells in (headings, *rows):
        aligned = [cells[0].ljust(widths[0])]
        for cell, width in zip(cells[1:], widths[1:], strict=True):
            is_drawn = cell and not set(cell) - set(HEIGHTS)
            aligned.append(cell.ljust(width) if is_drawn else cell.rjust(width))
        lines.append("  ".join(aligned).rstrip())
    return [style.heading(lines[0]), *lines[1:]]


def _number(value) -> str:
    return f"{value:,}" if isinstance(value, int | np.integer) else value


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _share(share: float) -> str:
    percent = 100 * float(share)
    if percent == 0:
        return "0 %"
    if percent < 0.1:
        return "< 0.1 %"
    return f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"


# ---- advice


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the user said, and what is known of the model."""

    choice: str  # of a config, as --config takes it; "" if none was named
    config: ConfigDict  # with all that the user set
    texts: dict[str, str]  # field -> its text, of all that the user set
    positions: int = 0  # of the model; 0: unknown


def advise(found: Survey, setup: Setup) -> Advice:
    """Return the command to train with, the reasons for its flags, and what to know before."""
    flags_to_add = {}
    reasons = []
    if found.cuts:
        _choose_length(found, setup, flags_to_add, reasons)
    if found.refusal:
        _allow_drops(found, setup, flags_to_add, reasons)
    _fit_steps(found, setup, flags_to_add, reasons)
    model = setup.config.model
    lacks_model = not model.path and not model.scratch
    texts = {"model.path": "MODEL"} if lacks_model else {}
    texts |= setup.texts | flags_to_add
    choice = setup.choice or STAGE_OF[found.kind]
    command = ["python", "-m", "dpo_jax.train", f"--config={choice}"]
    command += [shlex.quote(f"--config.{field}={text}") for field, text in texts.items()]
    max_length = int(texts.get("data.max_length", setup.config.data.max_length))
    return Advice(command, reasons, _warnings(found, setup, max_length))


def _choose_length(found: Survey, setup: Setup, texts: dict, reasons: list) -> None:
    """Add data.max_length, where the default cuts more than few rows and a longer one does not."""
    if "data.max_length" in setup.texts:
        return
    if not found.chat_lengths.are_nearly_whole(setup.config.data):
        max_length, max_prompt_length = found.chat_lengths.enough(setup.config.data)
        if max_length <= (setup.positions or max_length):
            texts["data.max_length"] = str(max_length)
            texts["data.max_prompt_length"] = str(max_prompt_length)
            reasons.append(f"max_length={max_length}: shorter ones cut chat prompts (see below)")
            return
    now = found.cut_at(setup.config.data.max_length)
    # Without a model's folder its positions are unknown, and the longest measured length will do.
    longest = setup.positions or found.cuts[-1].max_length
    possible = [cut for cut in found.cuts if cut.max_length <= longest]
    if now in possible and now.share_of_rows <= FEW_CUT:
        return
    if now in possible and now is possible[-1]:
        # A longer one would be as bad, or the model cannot read it.
        limit = "a longer one cuts as many"
        if setup.positions:
            limit = f"the model has {setup.positions} positions"
        reasons.append(
            f"max_length stays {now.max_length}, which cuts {_cut_share(now)} of the rows: {limit}"
        )
        return
    if not possible:
        texts["data.max_length"] = str(setup.positions)
        texts["data.max_prompt_length"] = str(setup.positions // 2)
        reasons.append(f"max_length={setup.positions}: the model has no more positions")
        return
    # The shortest that is good enough: attention and memory grow with the longest row.
    enough = [cut for cut in possible if cut.share_of_rows <= FEW_CUT]
    chosen = enough[0] if enough else possible[-1]
    texts["data.max_length"] = str(chosen.max_length)
    texts["data.max_prompt_length"] = str(chosen.max_prompt_length)
    reasons.append(
        f"max_length={chosen.max_length}: it cuts {_cut_share(chosen)} of the rows, "
        f"{now.max_length} cuts {_cut_share(now)}"
    )


def _cut_share(cut: Cut) -> str:
    return _share(cut.share_of_rows) if cut.rows else "none"


def _allow_drops(found: Survey, setup: Setup, texts: dict, reasons: list) -> None:
    """Add what lets training drop the rows at which it would stop."""
    data = setup.config.data
    if found.stops_at_row:
        texts["data.on_bad_row"] = "drop"
        reasons.append("on_bad_row=drop: training stops at a bad row otherwise (see below)")
    share = max(_dropped_share(found.ledger.train), _dropped_share(found.ledger.eval))
    if share > data.max_dropped:
        # Rounded up to a whole percent: the share itself is a long number.
        texts["data.max_dropped"] = f"{np.ceil(share * 100) / 100:g}"
        reasons.append(
            f"max_dropped: {_share(share)} of the rows of a split are dropped; first make sure "
            "that losing them is right"
        )


def _dropped_share(counts: Counts) -> float:
    # As the ledger judges: rows that a source leaves out by design are not held against the data.
    judged = counts.read - sum(counts.filtered.values())
    return sum(counts.dropped.values()) / max(judged, 1)


def _fit_steps(found: Survey, setup: Setup, texts: dict, reasons: list) -> None:
    """Add a batch, a warm-up and evaluations that fit into the run, where the data is small."""
    stage = STAGE_OF[found.kind]
    config = setup.config
    if not setup.choice and stage not in config.stages:
        config = configs.default((stage,))
    if stage not in config.stages or STAGES[stage].data != found.kind:
        return
    block = config[stage].copy_and_resolve_references()

    def add(name: str, value: int, reason: str) -> None:
        # What the user has set stays.
        if f"{stage}.{name}" not in setup.texts:
            texts[f"{stage}.{name}"] = str(value)
            reasons.append(f"{name}={value}: {reason}")
            block[name] = value

    rows = found.ledger.train.kept
    if block.get("distinct", False):
        rows -= found.repeats.train_rows_repeated
    if rows < block.batch_size:
        add("batch_size", min(8, rows), f"the data has {_plural(rows, 'row')}")
    steps = batches.steps_of(rows, block.batch_size, steps=block.steps, epochs=block.epochs)
    length = _plural(steps, "step")
    if steps <= block.warmup_steps:
        reason = f"the run has {length}, and the default is {block.warmup_steps}"
        add("warmup_steps", steps // 10, reason)
    if steps <= block.eval_every:
        add("eval_every", max(steps // 4, 1), f"a few evaluations within {length}")


def _warnings(found: Survey, setup: Setup, max_length: int) -> list[str]:
    """Return what may be wrong with the data or the settings.

    max_length: that of the command which is recommended.
    """
    data = setup.config.data
    train = found.ledger.train
    # The tokenizer's own, about boundaries that lie within tokens, come first.
    warnings = train.all_warnings()
    if found.refusal:
        warnings.append(f"training would stop at these rows: {found.refusal}")
    if not data.append_eos:
        warnings.append(
            "data.append_eos=False: responses have no EOS, unless the text has it, so the model "
            "does not learn to stop"
        )
    for cut in found.cuts:
        if cut.max_length == max_length and cut.share_of_rows > MANY:
            warnings.append(
                f"{_share(cut.share_of_rows)} of the rows are cut at data.max_length={max_length}, "
                f"and {_share(cut.share_of_responses)} of the responses lose their end and its EOS"
            )
    # A length that the user has not set is lowered to the model's.
    if setup.positions and max_length > setup.positions:
        warnings.append(
            f"data.max_length={max_length}, but the model has {setup.positions} positions"
        )
    if found.kind == "pairs":
        chosen, rejected = (np.mean(lengths) for lengths in found.trained_on.values())
        if abs(chosen - rejected) > LENGTH_BIAS * max(rejected, 1):
            longer = "longer" if chosen > rejected else "shorter"
            warnings.append(
                f"chosen responses are {_share(abs(chosen / max(rejected, 1) - 1))} {longer} than "
                "rejected ones on average: DPO will learn length, too"
            )
    if found.kind == "unpaired":
        block = setup.config.get("kto", configs.default(("kto",)).kto)
        imbalance = train.imbalance(block.desirable_weight, block.undesirable_weight)
        if imbalance:
            warnings.append(imbalance)
    if found.repeats.eval_prompts_in_train or found.repeats.test_prompts_in_train:
        warnings.append(
            "some prompts are both trained and evaluated on, so the evaluation is too good"
        )
    if found.repeats.train_rows_repeated > MANY_REPEATED * found.ledger.train.kept:
        share = found.repeats.train_rows_repeated / found.ledger.train.kept
        warnings.append(f"{_share(share)} of the training rows repeat an earlier one")
    if found.repeats.train_pairs_reversed:
        warnings.append(
            "some pairs contradict another one, whose responses are the other way round"
        )
    return warnings


# ---- the command


def look(setup: Setup, kind: str, tokenizer, *, shown: int) -> tuple[Survey, Advice]:
    """Survey the data that a config names; return what was found, and advice."""
    config = setup.config
    data = config.data
    if kind == "auto" and setup.choice:
        kind = _kind_of_run(config)
    elif kind == "auto":
        kind = survey.find_kind(data)
    _check_numbers_are_used(config, kind)
    # The sft stage of a run reads its own data, where the config has some.
    if kind == "sft" and data.sft_path and "data.path" not in setup.texts:
        data = data.copy_and_resolve_references()
        data.update(path=data.sft_path, eval_split="")
    found = survey.take(data, kind, tokenizer, shown=shown, progress=_show_progress)
    _show_progress(0)
    return found, advise(found, setup)


def _check_numbers_are_used(config: ConfigDict, kind: str) -> None:
    """Raise ValueError for columns of weights or margins where rows are no pairs."""
    for field in ("weight", "margin"):
        if config.data[field] and kind != "pairs" and "preferred_ft" not in config.stages:
            raise ValueError(
                f"config.data.{field} = {config.data[field]!r}: expected empty, as the rows are "
                "read as single completions, and it is of pairs."
            )


def _show_progress(rows: int) -> None:
    """Say on a terminal how many rows are read; 0 clears the line."""
    if rows % PROGRESS_EVERY or not sys.stderr.isatty():
        return
    said = f"{rows:,} rows" if rows else ""
    sys.stderr.write(f"\r{said:<{WIDTH // 2}}\r")
    sys.stderr.flush()


def _kind_of_run(config: ConfigDict) -> str:
    """Return what a stage of the run reads of the data: "pairs", "unpaired", or else "sft"."""
    for stage in config.stages:
        reads_pairs = STAGES[stage].data in ("pairs", "unpaired")
        if reads_pairs and not stage_table.trains_on_samples(config, stage):
            return STAGES[stage].data
    return "sft"


def to_dict(found: Survey, advice: Advice) -> dict:
    """Return the numbers of a report as plain values, for a JSON file."""
    lengths = {}
    for part, of_rows in found.lengths.items():
        lengths[part] = dict(
            mean=float(np.mean(of_rows)),
            median=float(np.median(of_rows)),
            quantile_95=float(np.quantile(of_rows, 0.95)),
            longest=int(of_rows.max()),
        )
    rows, prompts = np.unique(found.rows_per_prompt, return_counts=True)
    return dict(
        kind=found.kind,
        splits=found.uses,
        ledger=found.ledger.to_dict(),
        unit=found.unit,
        lengths=lengths,
        prompts_by_rows=dict(zip(map(str, rows), prompts.tolist(), strict=True)),
        repeats=dataclasses.asdict(found.repeats),
        truncate=found.truncate,
        cuts=[dataclasses.asdict(cut) for cut in found.cuts],
        command=" ".join(advice.command),
        reasons=advice.reasons,
        warnings=advice.warnings,
    )


def open_tokenizer(model_path: str, tokenizer_path: str) -> tuple[object, int]:
    """Return (tokenizer, positions) of a model; no weights are read.

    positions: how many the model has, 0 where its folder does not say. Raises FileNotFoundError
    where there is no such model or tokenizer, ValueError where it is of no supported family.
    """
    # Imported here, for it takes a second that a look at texts alone does not need.
    from dpo_jax.models import families, hf, loading

    positions = 0
    folder = None
    if model_path:
        model_folder, adapters = loading.find(model_path, weights=False)
        folder = loading.folder_of_tokenizer(model_folder, adapters)
        # A folder with a tokenizer alone is enough to look.
        if (model_folder / "config.json").exists():
            hf_config = hf.read_config(model_folder)
            families.from_hf(hf_config)  # which refuses what is not supported
            positions = hf_config.max_position_embeddings
    if tokenizer_path:
        folder = hf.fetch(tokenizer_path, weights=False)
    return tokenizers.load(folder), positions


def main():
    config_flags = command_line.define_config("")
    model = flags.DEFINE_string(
        "model", "", "The model: a folder in Hugging Face format, or a hub name."
    )
    tokenizer = flags.DEFINE_string(
        "tokenizer", "", "A tokenizer other than the model's: a folder, or a hub name."
    )
    kind = flags.DEFINE_enum(
        "kind",
        "auto",
        KINDS,
        "What to read rows as; auto: pairs where they have two responses, unpaired where they have "
        "one and a label, else sft.",
    )
    fields = {}
    for name in FIELDS:
        meaning = configs.DATA[name].meaning
        fields[name] = flags.DEFINE_string(name, None, f"As config.data.{name}: {meaning}.")
    shown = flags.DEFINE_integer(
        "show", 3, "How many rows to show.", lower_bound=0, upper_bound=1_000_000
    )
    out = flags.DEFINE_string("json", "", "A file to write the numbers to, as JSON.")

    def show_data(path: str):
        _check_folder(out.value)
        # The flags are short forms of fields, so that the same checks and messages hold for both.
        given = {"model.path": model.value, "model.tokenizer": tokenizer.value, "data.path": path}
        texts = {field: text for field, text in given.items() if text}
        for name, flag in fields.items():
            if flag.value is not None:
                texts[f"data.{name}"] = flag.value
        config_flags.overrides.update(texts)
        config = _load_config(config_flags)
        setup = Setup(config_flags.choice, config, config_flags.overrides)
        opened = None
        # The toy's words are its tokens, whatever the model.
        if config.data.source == "toy":
            opened = toy.tokenizer()
        elif config.model.path or config.model.tokenizer:
            opened, positions = open_tokenizer(config.model.path, config.model.tokenizer)
            setup = dataclasses.replace(setup, positions=positions)
        found, advice = look(setup, kind.value, opened, shown=shown.value)
        leaked = _leaks(config) if setup.choice else []

        # https://no-color.org: whoever sets the variable wants none.
        has_colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(report(found, _title(found, config), advice, Style(has_colours), leaked))
        if out.value:
            with whole_file(out.value) as draft:
                values = to_dict(found, advice) | dict(leaks=leaks.to_dict(leaked))
                draft.write_text(json.dumps(values, indent=2) + "\n")

    command_line.run(show_data, __doc__, config=config_flags, positional="PATH")


def _leaks(config: ConfigDict) -> list[leaks.Leak]:
    """Return the leaks between the data sets of a run; none where it has one, as Repeats tells."""
    if not config.data.sft_path:
        return []
    seen = leaks.read_runs([config])
    return leaks.of_run(seen) if len(seen) > 1 else []


def _check_folder(out: str) -> None:
    """Raise FileNotFoundError where a file cannot be written for want of its folder."""
    folder = pathlib.Path(out).absolute().parent
    if out and not folder.is_dir():
        raise FileNotFoundError(f"--json={out}: there is no folder {folder}. Make it first.")


def _load_config(config_flags: command_line.ConfigFlags) -> ConfigDict:
    """Return the config that was named, or else configs/dpo.py, with all that the user set."""
    config = config_files.load(config_flags.choice or "dpo")
    config_files.override(config, config_flags.overrides)
    if not (config.data.path or config.data.mix or config.data.source == "toy"):
        raise ValueError(
            "no data: give the PATH of a file, a folder or a data set on the hub, or --config=NAME."
        )
    whole = config.copy_and_resolve_references()
    if not whole.model.scratch:
        # A look needs no model, but a run does.
        whole.model.path = whole.model.path or "MODEL"
    config_checks.validate(whole)
    return config


def _title(found: Survey, config: ConfigDict) -> str:
    data = config.data
    name = data.path or data.mix or data.source
    title = f"{name}: {CALLED[found.kind]}, source {data.source}"
    model = config.model.tokenizer or config.model.path
    return f"{title}, tokens of {model}" if model else title


if __name__ == "__main__":
    main()
