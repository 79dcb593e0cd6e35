"""Write docs/config.md from dpo_jax/config.py: python docs/config_reference.py

Every field with its default and its meaning, from config.field_docs(). A test checks that the page
is what this script writes.
"""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # to run from a clone that is not installed

from dpo_jax import config as configs  # noqa: E402
from dpo_jax.stage_table import STAGES  # noqa: E402

PAGE = ROOT / "docs" / "config.md"
INTRO = """\
# Config

<!-- Written by `python docs/config_reference.py` from dpo_jax/config.py. Do not edit. -->

A config file calls `default(stages)` and changes fields. On the command line,
`--config.FIELD=VALUE` overrides any field:

```
python -m dpo_jax.train --config=imdb --config.dpo.beta=0.5 --config.data.max_rows=1000
```

The config has a block for each stage of the run, and no others. If you set a field that does not
exist, or that this run would not use, the command stops with an error that names it. So it does at
a value of another type, at a number that is not finite, and at one beyond what could be meant
(`steps` of 10^10, a LoRA rank above the model's width): every number has a range. Defaults are
the paper's (appendix B) or, where the paper does not say, those of its reference code.

The fields of `data.template` and `model.scratch` are not dpo_jax's, but the chat template's and
Hugging Face's, so you can set any of them, one by one or all together:

```
--config.data.template.enable_thinking=False --config.data.template.date_string="26 Jul 2024"
--config.data.template="enable_thinking=False,date_string=26 Jul 2024"
--config.data.template='{"enable_thinking": false, "date_string": "26 Jul 2024"}'
```

A value is a number, `True`, `False`, `None`, a list or a dict if it reads as one, and text
otherwise.

`--config` takes a file, or just the name of one in `configs/`. Some accept a choice after a colon:

| config | choices after the colon | what it is |
|---|---|---|
| `dpo`, `kto`, `sft` | | your model and your data |
| `toy` | a method | a complete experiment in about a minute, on generated data |
| `imdb` | a method | controlled sentiment with gpt2-large (paper, section 6.1) |
| `imdb_small` | a method | the same with 3.4 million weights, for 2 CPU cores |
| `imdb_smollm2` | a method | the same with SmolLM2-135M, for 2 CPU cores |
| `tldr` | a size, a method, or both, separated by a comma | summarisation (section 6.2) |
| `hh` | a method | single-turn dialogue (section 6.2) |

[Methods](methods.md) lists the methods.
"""
BLOCKS = {  # block -> its heading and what to say about it
    "": ("The run", ""),
    "model": ("Model: `model`", ""),
    "model.lora": ("Adapters: `model.lora`", "See [LoRA](lora.md)."),
    "data": ("Data: `data`", "See [data](data.md)."),
    "mesh": (
        "Devices: `mesh`",
        "The product of the sizes must be the number of devices; one of them may be -1, for all "
        "remaining devices. See [planning](planning.md#choosing-a-mesh).",
    ),
    "log": ("Logging: `log`", ""),
    "export": ("Exports: `export`", "See [exports](exports.md)."),
    "reward": (
        "Reward: `reward`",
        "For the stages that sample: `pairs`, `ppo`, `best_of_n`, `evaluate`.",
    ),
    "sampling": ("Sampling: `sampling`", "For the stages that sample."),
    "STAGE": (
        "Every training stage: `STAGE`",
        "STAGE is `sft`, `preferred_ft`, `unlikelihood`, `rm`, `dpo`, `kto` or `ppo`.",
    ),
    "sft": ("SFT: `sft`", ""),
    "preferred_ft": ("Preferred-FT: `preferred_ft`", ""),
    "unlikelihood": ("Unlikelihood: `unlikelihood`", ""),
    "dpo": ("DPO: `dpo`", ""),
    "kto": ("KTO: `kto`", "See [methods](methods.md#kto)."),
    "rm": ("Reward model: `rm`", "Only the fields of every training stage."),
    "ppo": ("PPO: `ppo`", ""),
    "pairs": ("Pairs from samples: `pairs`", "See [methods](methods.md#pairs-from-a-model)."),
    "pairs.judge": (
        "A judge of pairs: `pairs.judge`",
        "For `pairs.labels=judge`. See [judges](judges.md#labels-of-pairs).",
    ),
    "best_of_n": ("Best of N: `best_of_n`", ""),
    "evaluate": ("Evaluation: `evaluate`", ""),
}


def fields_of_blocks() -> dict[str, dict[str, tuple]]:
    """Return block -> field -> (default, meaning), the common fields of training stages apart."""
    found = {}
    for dotted, default, meaning in configs.field_docs():
        block, _, name = dotted.rpartition(".")
        if block in STAGES and STAGES[block].trains and name in configs.TRAINING:
            block = "STAGE"
            default = configs.TRAINING[name].default
        found.setdefault(block, {})[name] = (default, meaning)
    return found


def table(block: str, fields: dict[str, tuple]) -> list[str]:
    """Return the lines of a block's table."""
    lines = ["| field | default | meaning |", "|---|---|---|"]
    for field, (value, note) in fields.items():
        name = f"{block}.{field}" if block else field
        default = "by config file" if field == "stages" else f"`{shown(value)}`"
        lines.append(f"| `{name}` | {default} | {note.replace('|', chr(92) + '|')} |")
    return lines


def shown(value) -> str:
    """Return a default as one writes it on the command line."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:_}"
    return repr(value)


def page() -> str:
    """Return the text of docs/config.md."""
    fields = fields_of_blocks()
    lines = [INTRO]
    for block, (heading, text) in BLOCKS.items():
        lines += [f"## {heading}", ""]
        if text:
            lines += [text, ""]
        if fields.get(block):
            lines += [*table(block, fields[block]), ""]
        if block == "STAGE":
            lines += [*different_defaults(), ""]
    return "\n".join(lines).rstrip() + "\n"


def different_defaults() -> list[str]:
    """Return a table of the stages whose defaults differ from the others'."""
    lines = ["Some stages have other defaults:", "", "| stage | defaults |", "|---|---|"]
    for stage, fields in configs.STAGE_FIELDS.items():
        changed = [
            f"`{name}` `{shown(fields[name].default)}`"
            for name, common in configs.TRAINING.items()
            if STAGES[stage].trains and fields[name].default != common.default
        ]
        if changed:
            lines.append(f"| `{stage}` | {', '.join(changed)} |")
    return lines


if __name__ == "__main__":
    PAGE.write_text(page())
