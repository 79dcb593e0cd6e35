"""Model cards: README.md of hf/ and adapter/, which the hub shows, and reads the head of.

A card says what the model was trained from and on, with fingerprints, by which recipe, how it was
evaluated, and how it is loaded.
"""

import dataclasses
import json
import pathlib
import re

from ml_collections import ConfigDict

from dpo_jax import stage_table
from dpo_jax.changes import BY_FLAG
from dpo_jax.config import DATA, flat_fields
from dpo_jax.data import mixtures
from dpo_jax.data.sources import SOURCES
from dpo_jax.stage_table import STAGES
from dpo_jax.workdir import read_config, read_ledger, start_date

METHODS = {  # stage -> how a card calls it
    "sft": "supervised fine-tuning",
    "preferred_ft": "supervised fine-tuning on the chosen responses",
    "unlikelihood": "unlikelihood training",
    "rm": "reward modelling",
    "dpo": "Direct Preference Optimization (DPO)",
    "kto": "Kahneman-Tversky Optimization (KTO)",
    "ppo": "Proximal Policy Optimization (PPO)",
}
# Fields of a stage's block that say nothing of what was learned.
LEFT_OUT = ("eval_every", "save_every", "log_every", "keep", "microbatch_size", "cache_reference")
# Fields of the data block that change no token and no row.
LEFT_OUT_OF_DATA = ("max_dropped", "show")

LOADING = {
    "lm": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL")
tokenizer = AutoTokenizer.from_pretrained("MODEL")
```

```
vllm serve MODEL
python -m dpo_jax.sample --model=MODEL --prompts=PROMPTS.jsonl --out=SAMPLES.jsonl
```
""",
    "reward": """\
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("MODEL")
tokenizer = AutoTokenizer.from_pretrained("MODEL")
```

In dpo_jax it is a reward: `--config.reward.kind=model --config.reward.path=MODEL`.
""",
    "adapter": """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "MODEL")
```

In dpo_jax an adapter stands for its base with the adapter merged into it:

```
python -m dpo_jax.sample --model=MODEL --prompts=PROMPTS.jsonl --out=SAMPLES.jsonl
```
""",
    "reward_adapter": """\
```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained({base}, num_labels=1)
model = PeftModel.from_pretrained(base, "MODEL")
```
""",
}


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """What is told of a trained model."""

    config: ConfigDict  # the run's
    stage: str
    folder: pathlib.Path  # the stage's, with ledger.json and config.json
    fingerprint: str  # of the weights that training started from
    evaluation: dict[str, float]  # metric -> value, at the end of training
    dtype: str  # of the stored weights
    start: str = ""  # path of the weights that adapters are over; "": config.model.path

    def text(self) -> str:
        """Return the card of the whole model."""
        kind = "reward" if STAGES[self.stage].head == "reward" else "lm"
        return self._card("transformers", LOADING[kind], self._base)

    def adapter_text(self) -> str:
        """Return the card of the adapters alone."""
        is_reward = STAGES[self.stage].head == "reward"
        loading = LOADING["reward_adapter" if is_reward else "adapter"]
        start = self.start or self._base
        # Adapters over the sft stage's weights, or an earlier round's, are over no hub's model.
        hub_base = self._base if start == self._base else ""
        return self._card("peft", loading.format(base=json.dumps(start)), hub_base)

    @property
    def _base(self) -> str:
        return self.config.model.path

    def _card(self, library: str, loading: str, hub_base: str) -> str:
        """Return a card; hub_base: what its head names as the base, where that is on the hub."""
        base = self._base or "random weights"
        path = pathlib.PurePath(base)
        # An export's folder is called hf, whatever it holds: its stage's name says more.
        name = path.parent.name if path.name == "hf" else path.name
        parts = [
            self._front_matter(library, hub_base),
            f"# {name}, {METHODS[self.stage]}",
            f"{self._summary()} In the commands below, MODEL stands for this folder, or for its "
            "name on the hub.",
            "## Base model",
            _table([("model", base), ("stored in", self.dtype), *self._start()]),
            "## Data",
            _table(self._data()),
            "## Recipe",
            _table(self._recipe()),
        ]
        if self.evaluation:
            rows = [(metric, f"{value:.6g}") for metric, value in self.evaluation.items()]
            results = "At the end of training, on what was held out"
            if stage_table.moves_reference(self.config[self.stage]):
                results += " (loss and rewards against the reference as it had moved by then)"
            parts += ["## Results", f"{results}:", _table(rows)]
        parts += ["## Loading", loading]
        return "\n\n".join(part.strip() for part in parts) + "\n"

    def _front_matter(self, library: str, base: str) -> str:
        """Return the head that the hub reads, in YAML."""
        is_reward = STAGES[self.stage].head == "reward"
        fields = {}
        # The hub knows models and data sets by their names on it, and by no path.
        if _is_hub_name(base):
            fields["base_model"] = base.partition("@")[0]
            fields["base_model_relation"] = "adapter" if library == "peft" else "finetune"
        hub_names = [name.partition(":")[0] for name in self._paths() if _is_hub_name(name)]
        # Two subsets are one data set on the hub.
        data_sets = list(dict.fromkeys(hub_names))
        if data_sets:
            fields["datasets"] = data_sets
        fields["library_name"] = library
        fields["pipeline_tag"] = "text-classification" if is_reward else "text-generation"
        fields["tags"] = ["dpo_jax", self.stage, *(["lora"] if self._has_lora else [])]
        # JSON is YAML, and quotes whatever needs it.
        lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
        return "\n".join(["---", *lines, "---"])

    @property
    def _has_lora(self) -> bool:
        return bool(self.config.model.lora.rank)

    def _summary(self) -> str:
        stages = self._stages()
        before = f" after {' and '.join(stages[:-1])}" if len(stages) > 1 else ""
        adapters = ", by LoRA" if self._has_lora else ""
        number = self._round
        rounds = f", round {number}" if number > 1 else ""
        method = f"{METHODS[self.stage]} (`{self.stage}`{before})"
        return f"Trained with dpo_jax: {method}{adapters}{rounds}."

    @property
    def _round(self) -> int:
        """The round that trained the model; 1 for a stage that no round repeats."""
        return self.config.rounds if stage_table.repeats(self.config, self.stage) else 1

    def _stages(self) -> list[str]:
        """Return the stages that trained, up to this one."""
        trained = stage_table.training_stages(self.config)
        # Not a reward model before a policy: the policy does not start from it.
        lineage = [stage for stage in trained if stage in ("sft", self.stage)]
        return lineage[: lineage.index(self.stage) + 1]

    def _start(self) -> list[tuple[str, str]]:
        kind = "the sft stage's weights" if len(self._stages()) > 1 else "its weights"
        # A reward model starts anew in each round.
        if self._round > 1 and STAGES[self.stage].is_policy:
            kind = f"the weights after round {self._round - 1}"
        return [(f"fingerprint of {kind}", f"sha256 {self.fingerprint}")]

    def _paths(self) -> list[str]:
        data = self.config.data
        mixed = [ingredient.path for ingredient in mixtures.parse(data.mix, SOURCES)]
        return [name for name in (data.path, data.sft_path, *mixed) if name]

    def _data(self) -> list[tuple[str, str]]:
        """Return what was read and how, how much of it, and the fingerprints of its tokens."""
        data = self.config.data
        rows = []
        for name in DATA:
            value = data[name]
            # A frozen config's empty block equals no other config's.
            is_empty = len(value) == 0 if isinstance(value, ConfigDict) else value in ("", ())
            if name not in LEFT_OUT_OF_DATA and not is_empty:
                rows.append((f"data.{name}", _shown(value)))
        # Some chat templates write it.
        rows.append(("date for chat templates", start_date(self.folder).isoformat()))
        if stage_table.trains_on_samples(self.config, self.stage):
            rows.append(("pairs", "sampled from the model before this stage, and labelled"))
        # Pairs that were sampled have another ledger, in their own stage.
        ledger = read_ledger(self.folder, train=dict(kept=int), eval=dict(kept=int))
        for split in ("train", "eval"):
            if split in ledger:
                rows.append((f"examples ({split})", f"{ledger[split]['kept']:,}"))
        if "prompts" in ledger:
            rows.append(("prompts", f"{ledger['prompts']:,}"))
        fingerprints = ledger["fingerprint"]
        if isinstance(fingerprints, str):
            fingerprints = [fingerprints]
        for split, fingerprint in zip(("train", "eval"), fingerprints, strict=False):
            rows.append((f"fingerprint of the tokens ({split})", f"sha256 {fingerprint}"))
        return rows

    def _recipe(self) -> list[tuple[str, str]]:
        """Return the settings of each stage up to this one, and those that they share."""
        rows = []
        for stage in self._stages():
            fields = flat_fields(stage, self.config[stage].to_dict())
            for name, value in fields.items():
                if name.rpartition(".")[2] not in LEFT_OUT:
                    rows.append((name, _shown(value)))
        shared = flat_fields("model", self.config.model.to_dict())
        for name, value in shared.items():
            is_lora = name.startswith("model.lora.") and self._has_lora
            if name == "model.dtype" or is_lora:
                rows.append((name, _shown(value)))
        rows.append(("seed", _shown(self.config.seed)))
        if self._round > 1:
            rows.append(("round", str(self._round)))
        for change in read_config(self.folder).get("changes", []):
            # The others change no result.
            if change["reason"] == BY_FLAG:
                told = f"{_shown(change['old'])} before, {_shown(change['new'])} after"
                rows.append((f"{change['field']}, changed at step {change['step']}", told))
        return rows


def _is_hub_name(name: str) -> bool:
    """Return whether a path names something on the hub, OWNER/NAME, with what may follow."""
    if pathlib.Path(name).expanduser().exists():
        return False
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*([@:].+)?", name) is not None


def _table(rows: list[tuple[str, str]]) -> str:
    lines = ["| | |", "|---|---|"]
    for name, value in rows:
        # A bar would end the cell.
        value = value.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {name} | {value} |")
    return "\n".join(lines)


def _shown(value) -> str:
    if isinstance(value, ConfigDict):
        return json.dumps(value.to_dict())
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "(none)"
    return str(value) if value != "" else "(none)"
