"""The page about runs: one HTML file without scripts, which loads nothing.

Texts of data, models and configs may come from anybody: all of them pass `html.escape`, and the
page's content security policy forbids scripts, forms and anything from elsewhere.
"""

import dataclasses
import html
import json
import statistics
from collections.abc import Callable

from dpo_jax.reporting import charts
from dpo_jax.reporting.charts import COLOURS, Curve, number
from dpo_jax.reporting.records import Completion, Record, Sample
from dpo_jax.reporting.remarks import Remark, end_of, remarks
from dpo_jax.reporting.style import STYLE

SAMPLES = 8  # prompts that are shown with their completions
LONGEST = 1500  # characters of a text that is shown
FEW_RUNS = 3  # runs over each other whose single steps can still be told apart

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@dataclasses.dataclass(frozen=True)
class Plot:
    """A chart of a stage: metrics by name, with {split} for train and eval, and their labels."""

    title: str  # {responses}: those of its metrics
    metrics: dict[str, str]  # metric -> label
    is_log: bool = False
    is_exact: bool = False  # without noise, so that no mean is drawn
    note: str = ""


# In the order of the page; a chart of which nothing was measured is left out.
PLOTS = (
    Plot("Loss", {"loss/{split}": ""}),
    Plot("Loss per token, nats", {"nll_per_token/{split}": ""}),
    Plot("Accuracy", {"rewards_{split}/accuracies": ""}),
    Plot("Margin", {"rewards_{split}/margins": ""}),
    Plot(
        "Rewards of {responses}",
        {"rewards_{split}/chosen": "chosen", "rewards_{split}/rejected": "rejected"},
    ),
    Plot(
        "Log-probs of {responses}, nats",
        {"logps_{split}/chosen": "chosen", "logps_{split}/rejected": "rejected"},
    ),
    Plot("Weight of a pair in the gradient", {"dpo_{split}/gradient_weight": ""}),
    Plot("Imbalance of the experts", {"router_{split}/imbalance": ""}),
    Plot("KTO's baseline, the KL of the batch, nats", {"kto_{split}/kl": ""}),
    Plot("True reward of completions", {"frontier/reward": ""}),
    Plot("KL to the reference, nats", {"frontier/kl": ""}),
    Plot("Length of completions, tokens", {"frontier/length": ""}),
    Plot("Completions that end by EOS, share", {"frontier/eos_rate": ""}),
    Plot("Repeated 3-grams, share", {"frontier/repetition": ""}),
    Plot("Reward of PPO's completions", {"ppo_train/reward": ""}),
    Plot("KL of PPO's completions, nats", {"ppo_train/kl": ""}),
    Plot("Weight of PPO's KL penalty", {"ppo_train/kl_coef": ""}, is_exact=True),
    Plot("Length of PPO's completions, tokens", {"ppo_train/length": ""}),
    Plot("PPO's completions that end by EOS, share", {"ppo_train/eos_rate": ""}),
    Plot("PPO's clipped tokens, share", {"ppo_train/clipped": ""}),
    Plot("KL of PPO's updates, nats a token", {"ppo_train/kl_to_sampler": ""}),
    Plot("PPO's policy loss", {"ppo_train/policy_loss": ""}),
    Plot("PPO's value loss", {"ppo_train/value_loss": ""}, is_log=True),
    Plot(
        "Lengths of the data: {responses}, tokens",
        {"lengths_{split}/chosen": "chosen", "lengths_{split}/rejected": "rejected"},
    ),
    Plot("Norm of the gradient", {"grad_norm": ""}, is_log=True),
    Plot("Norm of the weights", {"param_norm": ""}),
    Plot("Norm of the update", {"update_norm": ""}, is_log=True),
    Plot("Learning rate", {"lr": ""}, is_exact=True),
    Plot("Tokens per second", {"tokens_per_second": ""}, is_log=True),
    Plot(
        "Seconds a step",
        {"step_time": ""},
        is_log=True,
        note="Without evaluations and checkpoints. The first steps compile.",
    ),
    Plot("Share of the devices' peak (MFU)", {"model_flops_utilization": ""}),
)

# Column of the tables of numbers -> where it is looked for, the first that was measured.
FINAL = {
    "loss": ("loss/eval", "loss/train"),
    "accuracy": ("rewards_eval/accuracies", "rewards_train/accuracies"),
    "margin": ("rewards_eval/margins", "rewards_train/margins"),
    "reward": ("frontier/reward", "ppo_train/reward"),
    "KL": ("frontier/kl", "ppo_train/kl"),
    "tokens/s": ("tokens_per_second",),
}


def page(title: str, records: list[Record], made: str, link: Callable[[str], str]) -> str:
    """Return the page about some stages, in their order.

    made: when. link: a page of docs/ with its heading -> where it is from here, "" if nowhere.
    """
    groups = {}
    for record in records:
        groups.setdefault(record.stage, []).append(record)
    charted = {stage: group for stage, group in groups.items() if any(one.rows for one in group)}
    sections = [_friend(records, link), _runs(records)]
    # What is looked for first is the last that was trained.
    sections += [_stage(stage, group) for stage, group in reversed(charted.items())]
    sections += [_samples(records), _ledgers(records), _configs(records)]
    shown = [section for section in sections if section is not None]
    running = [record.name for record in records if record.status.startswith("running")]
    note = (
        f" Still running: {', '.join(running)}; the page shows what there was." if running else ""
    )
    links = " ".join(section.link() for section in shown)
    body = "".join(section.text() for section in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_e(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>"
        f'<header><h1>{_e(title)}</h1><p class="note">Written {_e(made)} by dpo-jax report.'
        f"{_e(note)}</p><nav>{links}</nav></header>\n{body}</main></body></html>\n"
    )


@dataclasses.dataclass(frozen=True)
class _Section:
    """A part of the page with a heading; its body is HTML."""

    anchor: str
    title: str
    body: str

    def link(self) -> str:
        return f'<a href="#{self.anchor}">{_e(self.title.partition(":")[0])}</a>'

    def text(self) -> str:
        return f'<section id="{self.anchor}"><h2>{_e(self.title)}</h2>{self.body}</section>\n'


def _e(value: object) -> str:
    return html.escape(str(value))


def _friend(records: list[Record], link: Callable[[str], str]) -> _Section:
    """Return what the checks found, warnings first, and the checks that found nothing."""
    # Of a sweep's runs many say the same: they share a box.
    boxes: dict[tuple[str, str], list[tuple[str, Remark]]] = {}
    fine = []
    for record in records:
        passed = []
        for check, found in remarks(record).items():
            if found == []:
                passed.append(check)
            for remark in found or []:
                boxes.setdefault((remark.level, check), []).append((record.name, remark))
        if passed:
            fine.append(f"<li><b>{_e(record.name)}</b>: {_e(', '.join(passed))}</li>")
    in_order = sorted(boxes.items(), key=lambda box: box[0][0] != "warning")
    items = [_box(level, lines, link) for (level, _), lines in in_order]
    body = f'<ul class="remarks">{"".join(items)}</ul>' if items else "<p>Nothing to remark.</p>"
    if fine:
        opened = "" if items else " open"
        body += (
            f"<details{opened}><summary>Looked at, and nothing found</summary>"
            f"<ul>{''.join(fine)}</ul></details>"
        )
    return _Section("friend", "What a careful friend would say", body)


def _box(level: str, lines: list[tuple[str, Remark]], link: Callable[[str], str]) -> str:
    """Return the box of a check: what it says of one run or several, and what to read."""
    mark = "!" if level == "warning" else "i"
    pages = dict.fromkeys(remark.page for _, remark in lines)
    texts = [f"<p><b>{_e(name)}</b> {_e(remark.text)}</p>" for name, remark in lines]
    read = ", ".join(_page_link(page, link(page)) for page in pages)
    return (
        f'<li class="{level}"><i>{mark}</i><div>{"".join(texts)}'
        f'<p class="read">Read {read}</p></div></li>'
    )


def _page_link(name: str, target: str) -> str:
    """Return a link to a page of docs/, or its name where it is not known where that is."""
    return f'<a href="{_e(target)}">docs/{_e(name)}</a>' if target else f"docs/{_e(name)}"


def _runs(records: list[Record]) -> _Section:
    """Return the table of all stages: how they ended, and their last numbers."""
    heads = ["folder", "stage", "status", "steps", "time", *FINAL]
    rows = []
    for record in records:
        cells = [record.name, record.stage, record.status, _steps(record), _time(record)]
        rows.append(cells + [_final(record, names) for names in FINAL.values()])
    body = _table(heads, rows, kind="tight")
    body += (
        '<p class="note">Loss, accuracy and margin are of the last evaluation on held-out '
        "examples; a star marks those of training steps at the end. Time is that of the steps, "
        "without evaluations and checkpoints.</p>"
    )
    lines = [line for record in records for line in [*record.problems, *record.changes]]
    if lines:
        body += f"<ul>{''.join(f'<li>{_e(line)}</li>' for line in lines)}</ul>"
    return _Section("runs", "Runs", body)


def _steps(record: Record) -> str:
    if record.last_step is None:
        return ""
    total = record.total
    return f"{record.last_step} of {total}" if total else f"{record.last_step}"


def _time(record: Record) -> str:
    """Return the time of all steps, from those that were written."""
    times = record.values("step_time")
    if not times:
        return ""
    # With log_every, the rows between were not written.
    seconds = statistics.fmean(times) * (record.last_step or 0)
    if seconds < 120:
        return f"{seconds:.3g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def _final(record: Record, names: tuple[str, ...]) -> str:
    """Return the last value of the first metric that was measured; a star: of training steps."""
    for name in names:
        values = record.values(name)
        if not values and isinstance(record.result.get(name), int | float):
            values = [record.result[name]]
        if not values:
            continue
        if name == "tokens_per_second":
            return number(statistics.median(values))
        is_training = "train" in name
        # Of a single batch there is little to say.
        value = end_of(values) if is_training else values[-1]
        return number(value) + ("*" if is_training else "")
    return ""


def _stage(stage: str, group: list[Record]) -> _Section:
    """Return the charts of a stage's runs, one over the other, and where several differ."""
    body = _comparison(group) if len(group) > 1 else ""
    figures = []
    for plot in PLOTS:
        if len(group) == 1:
            figures.append(_chart_of_one(plot, group[0]))
        else:
            figures += _charts_of_several(plot, group)
    against = [
        Curve(record.name, _reward_by_kl(record), index, is_dotted=True)
        for index, record in enumerate(group)
    ]
    figures.append(charts.chart("True reward against KL", against, x_label="KL, nats"))
    faint = "Faint: each training step. " if len(group) <= FEW_RUNS else ""
    legend = (
        f'<p class="note">{faint}Lines: mean over the last steps of training. Dots: evaluations '
        "on held-out examples. Numbers: the last values.</p>"
    )
    body += f'{legend}<div class="charts">{"".join(figures)}</div>'
    return _Section(f"stage-{_anchor(stage)}", f"Curves of {stage}", body)


def _anchor(text: str) -> str:
    return "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in text)


def _of_its_data(plot: Plot, record: Record) -> Plot:
    """Return a plot as it is for a stage without rejected responses, if this is one."""
    if len(plot.metrics) == 1 or len(_metrics_of(plot, record)) > 1:
        return plot
    chosen, *_ = plot.metrics
    return dataclasses.replace(plot, metrics={chosen: ""})


def _metrics_of(plot: Plot, record: Record) -> list[str]:
    """Return the metrics of a plot that a run has measured."""
    splits = ("train", "eval")
    return [
        metric
        for metric in plot.metrics
        if any(record.points(metric.format(split=split)) for split in splits)
    ]


def _chart_of_one(plot: Plot, record: Record) -> str:
    """Return a chart of one run: training and evaluation together."""
    plot = _of_its_data(plot, record)
    curves = []
    for index, (metric, label) in enumerate(plot.metrics.items()):
        training = record.points(metric.format(split="train"))
        held_out = record.points(metric.format(split="eval")) if "{split}" in metric else []
        is_evaluation = metric.startswith("frontier/")
        # A metric without a label has the chart's: its colours tell training from evaluation.
        colour = index if label else 0
        name = label or ("held-out prompts" if is_evaluation else "training")
        curves.append(
            Curve(
                name,
                training,
                colour,
                is_dotted=is_evaluation,
                has_single_steps=True,
                is_exact=plot.is_exact,
            )
        )
        name = f"{label}, held out" if label else "held out"
        curves.append(Curve(name, held_out, index if label else 1, is_dotted=True))
    title = plot.title.format(responses=" and ".join(plot.metrics.values()) or "responses")
    return charts.chart(title, curves, is_log=plot.is_log, note=plot.note)


def _charts_of_several(plot: Plot, group: list[Record]) -> list[str]:
    """Return a chart of several runs for each metric: held out where it is, else training."""
    plot = _of_its_data(plot, group[0])
    found = []
    for metric, label in plot.metrics.items():
        held_out = metric.format(split="eval")
        is_split = held_out != metric
        is_evaluation = metric.startswith("frontier/")
        is_held_out = is_split and any(record.points(held_out) for record in group)
        name = held_out if is_held_out else metric.format(split="train")
        curves = [
            Curve(
                record.name,
                record.points(name),
                index,
                is_dotted=is_held_out or is_evaluation,
                has_single_steps=len(group) <= FEW_RUNS,
                is_exact=plot.is_exact,
            )
            for index, record in enumerate(group)
        ]
        title = plot.title.format(responses=label or "responses")
        if is_split:
            title += ", held out" if is_held_out else ", training"
        found.append(charts.chart(title, curves, is_log=plot.is_log, note=plot.note))
    return found


def _reward_by_kl(record: Record) -> charts.Points:
    """Return (KL, reward) of each evaluation."""
    rewards = dict(record.points("frontier/reward"))
    kls = dict(record.points("frontier/kl"))
    return [(kls[step], rewards[step]) for step in kls if step in rewards]


def _comparison(group: list[Record]) -> str:
    """Return the table of what differs between runs, and of their last numbers."""
    flat = [_flat(record.config) for record in group]
    names = {name: None for fields in flat for name in fields}
    differing = [
        name
        for name in names
        if name != "run" and len({json.dumps(fields.get(name)) for fields in flat}) > 1
    ]
    heads = ["run", *differing, "steps", *FINAL]
    rows = []
    for record, fields in zip(group, flat, strict=True):
        own = [_value(fields.get(name, "")) for name in differing]
        last = [_final(record, metrics) for metrics in FINAL.values()]
        rows.append([record.name, *own, _steps(record), *last])
    swatches = [f'<i class="dot b{index % COLOURS}"></i>' for index in range(len(group))]
    return _table(heads, rows, marks=swatches, kind="tight")


def _samples(records: list[Record]) -> _Section | None:
    """Return completions of the policy beside those of the reference."""
    sampled = [record for record in records if record.samples]
    if not sampled:
        return None
    parts = []
    for index, record in enumerate(sampled):
        blocks = "".join(_sample(sample) for sample in record.samples[:SAMPLES])
        opened = "" if index else " open"
        parts.append(f"<details{opened}><summary>{_e(record.name)}</summary>{blocks}</details>")
    return _Section("samples", "Completions", "".join(parts))


def _sample(sample: Sample) -> str:
    return (
        f'<div class="sample"><pre class="prompt">{_cut(sample.prompt)}</pre>'
        f'<div class="sides">{_side("policy", sample.policy)}'
        f"{_side('reference', sample.reference) if sample.reference else ''}</div></div>"
    )


def _side(name: str, completion: Completion) -> str:
    reward = "" if completion.reward is None else f", reward {number(completion.reward)}"
    return f"<div><b>{name}{reward}</b><pre>{_cut(completion.text)}</pre></div>"


def _cut(text: str) -> str:
    """Return a text for the page, its end left out where it is very long."""
    more = len(text) - LONGEST
    return _e(text) if more <= 0 else f"{_e(text[:LONGEST])} <em>and {more:,} characters more</em>"


def _ledgers(records: list[Record]) -> _Section | None:
    """Return the counts of each stage's data, those that are not 0."""
    parts = []
    for record in records:
        splits = []
        for name in ("train", "eval", "test"):
            if isinstance(record.ledger.get(name), dict):
                splits.append(name)
        flat = {name: _flat(record.ledger[name]) for name in splits}
        names = {name: None for fields in flat.values() for name in fields}
        rows = []
        for name in names:
            values = [flat[split].get(name, "") for split in splits]
            if any(values):
                rows.append([name.replace("_", " "), *map(_value, values)])
        others = {
            name: value
            for name, value in record.ledger.items()
            if name not in (*splits, "parts", "fingerprint", "sha256") and value
        }
        for name, value in _flat(others).items():
            rows.append([name.replace("_", " "), _value(value), *[""] * (len(splits) - 1)])
        if rows:
            heads = ["", *(splits or ["count"])]
            parts.append(f"<h3>{_e(record.name)}</h3>{_table(heads, rows)}")
    if not parts:
        return None
    return _Section("ledger", "Ledger: what became of every row", "".join(parts))


def _configs(records: list[Record]) -> _Section:
    """Return the fields that differ from the defaults, and all of each stage folded away."""
    # A field that differs in the same way in every stage is shown once.
    known = [record.differs for record in records if record.differs is not None]
    common = {}
    if len(known) > 1:
        first, *others = known
        common = {
            name: values
            for name, values in first.items()
            if all(other.get(name) == values for other in others)
        }
    parts = []
    if common:
        parts.append(f"<h3>all stages</h3>{_differing(common)}")
    for record in records:
        parts.append(f"<h3>{_e(record.name)}</h3>")
        if record.differs is None:
            parts.append("<p>A config of another version: its defaults are not known.</p>")
        else:
            own = {name: record.differs[name] for name in record.differs if name not in common}
            parts.append(_differing(own) if own else f"<p>{_nothing(common)}</p>")
        rows = [[name, _value(value)] for name, value in _flat(record.config).items()]
        everything = _table(["field", "value"], rows)
        parts.append(f"<details><summary>All {len(rows)} fields</summary>{everything}</details>")
    return _Section("config", "Config: what differs from the defaults", "".join(parts))


def _nothing(common: dict) -> str:
    return "Nothing else differs." if common else "Nothing differs from the defaults."


def _differing(fields: dict) -> str:
    rows = [[name, _value(own), _value(default)] for name, (own, default) in fields.items()]
    return _table(["field", "value", "default"], rows)


def _flat(tree: dict, prefix: str = "") -> dict:
    """Return the leaves of nested dicts by dotted name."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _value(value: object) -> str:
    """Return a field's value, or a count, as it is shown."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _table(
    heads: list[str], rows: list[list[str]], marks: list[str] | None = None, kind: str = ""
) -> str:
    """Return a table without the columns that are empty.

    marks: HTML before each first cell. kind: a class of the style sheet.
    """
    used = [
        column for column, head in enumerate(heads) if any(row[column] for row in rows) or not head
    ]
    lines = ["".join(f"<th>{_e(heads[column])}</th>" for column in used)]
    for index, row in enumerate(rows):
        mark = marks[index] if marks else ""
        cells = [f"<td>{mark if not column else ''}{_e(row[column])}</td>" for column in used]
        lines.append("".join(cells))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide {kind}"><table>{body}</table></div>'
