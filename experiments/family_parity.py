"""Measure how near each model family comes to transformers, on tiny random models.

    python -m experiments.family_parity

Measures every variant in VARIANTS of `tests/helpers/tiny_models.py`, in float32, with all weights
random, norms and biases too:

    logits     ours of torch's weights, and torch's of our weights, which we have exported
    export     whether torch's weights, read and exported again, are the same file
    greedy     whether prompts of 1 to 11 tokens are continued as generate does, token by token
    gradients  of the log-probs of all tokens: the error of a tensor's gradient, relative to its
               norm, or to 1% of the whole gradient's, where a tensor's own is smaller
    lora       logits under random adapters that we have exported, as peft has them

--variants=NAME,NAME measures these, and keeps the other rows. Writes family_parity.json and
family_parity.md to experiments/results, and the largest figures of each family to the table in
docs/models.md. It takes about a minute and a half of a CPU core.
"""

import copy
import dataclasses
import functools
import json
import os
import pathlib
import tempfile

import numpy as np

from experiments.commands import machine

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGE = ROOT / "docs" / "models.md"
ROWS, LENGTH = 2, 24
PROMPT_LENGTHS = (3, 11, 1, 7)
NEW_TOKENS = 12
DIFFERENCES = ("logits", "logits_back", "gradients", "lora")
HEADER = "logits | logits, ours in torch | export | greedy | gradients | LoRA |"


@dataclasses.dataclass(frozen=True)
class Case:
    """A variant's torch model, and the same weights here."""

    variant: str
    folder: pathlib.Path  # the torch model as transformers writes it
    hf_config: object
    config: object  # TransformerConfig
    params: dict
    theirs: object


def open_case(variant: str, folder: pathlib.Path) -> Case:
    """Write a variant's torch model to a folder, and read it."""
    from dpo_jax.models import families, hf
    from tests.helpers import tiny_models

    tiny_models.write(variant, folder)
    hf_config = hf.read_config(folder)
    config = families.from_hf(hf_config)
    params = hf.load(folder, config, tiny_models.placed(config))
    return Case(variant, folder, hf_config, config, params, tiny_models.torch_model(variant))


def measure(variant: str) -> dict:
    """Return a variant's row."""
    with tempfile.TemporaryDirectory(prefix="dpo_jax_parity_") as folder:
        folder = pathlib.Path(folder)
        case = open_case(variant, folder / "theirs")
        tokens_BT = _draw(case, (ROWS, LENGTH))
        expected_BTV = _torch_logits(case.theirs, tokens_BT)
        return dict(
            variant=variant,
            family=case.hf_config.model_type,
            largest_logit=float(np.abs(expected_BTV).max()),
            logits=_largest(_logits(case.config, case.params, tokens_BT) - expected_BTV),
            logits_back=logits_back(variant, folder / "ours", tokens_BT),
            export=is_exported_alike(case, folder / "again"),
            greedy=greedy(case),
            gradients=gradients(case, folder, tokens_BT),
            lora=lora(case, folder / "adapter", tokens_BT),
        )


def logits_back(variant: str, folder: pathlib.Path, tokens_BT) -> float:
    """Return the largest difference of logits of our own weights, exported and opened by torch."""
    import transformers

    from tests.helpers import tiny_models

    model = tiny_models.random_model(variant)
    _, config, params = model
    tiny_models.save_model(model, folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return _largest(_logits(config, params, tokens_BT) - _torch_logits(theirs.eval(), tokens_BT))


def is_exported_alike(case: Case, folder: pathlib.Path) -> bool:
    """Return whether torch's weights come out as they went in: names, types and numbers."""
    from dpo_jax.models import hf

    hf.save(folder, case.config, case.hf_config, case.params)
    before, after = _stored(case.folder), _stored(folder)
    return before.keys() == after.keys() and all(
        before[name].dtype == after[name].dtype and np.array_equal(before[name], after[name])
        for name in before
    )


def greedy(case: Case) -> list[int]:
    """Return how many prompts are continued as by torch's generate, and of how many."""
    import jax
    import torch

    from dpo_jax.models.loading import Model
    from dpo_jax.parallel import sharding
    from dpo_jax.sampling.sampler import Sampling, sample

    prompts = [_draw(case, length, seed=length) for length in PROMPT_LENGTHS]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    eos_id = case.hf_config.eos_token_id
    model = Model(case.config, case.params, None, mesh, eos_id)
    ours = sample(model, prompts, Sampling(NEW_TOKENS, temperature=0))
    equal = 0
    for prompt, (one,) in zip(prompts, ours, strict=True):
        with torch.no_grad():
            whole = case.theirs.generate(
                torch.tensor(prompt[None].astype(int)),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=0,
            )
        equal += one.tokens.tolist() == whole[0, len(prompt) :].tolist()
    return [equal, len(prompts)]


def gradients(case: Case, folder: pathlib.Path, tokens_BT) -> float:
    """Return the largest relative error of the gradient of the tokens' log-probs."""
    import jax
    import torch

    from dpo_jax.models import hf, transformer

    # Both are written as weights are, so that they have the same names and shapes.
    theirs = copy.deepcopy(case.theirs)
    tokens = torch.tensor(tokens_BT.astype(int))
    log_probs = theirs(tokens[:, :-1]).logits.log_softmax(-1)
    log_probs.gather(-1, tokens[:, 1:, None]).sum().backward()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(folder / "their_gradient")

    def total(params):
        log_probs_BTV = jax.nn.log_softmax(
            transformer.logits(case.config, params, tokens_BT[:, :-1])
        )
        return jax.numpy.take_along_axis(log_probs_BTV, tokens_BT[:, 1:, None], -1).sum()

    ours = jax.jit(jax.grad(total))(case.params)
    hf.save(folder / "our_gradient", case.config, case.hf_config, ours)
    return relative_error(_stored(folder / "our_gradient"), _stored(folder / "their_gradient"))


def relative_error(ours: dict, theirs: dict) -> float:
    """Return the largest error of a tensor, relative to its norm or to 1% of the norm of all.

    The latter where a tensor's own norm is smaller: a gradient that is 0 in exact arithmetic, as
    of a bias of keys, is rounding noise. Raises ValueError where the names differ.
    """
    if ours.keys() != theirs.keys():
        raise ValueError(f"tensors of one side alone: {sorted(ours.keys() ^ theirs.keys())}")
    norms = {name: np.linalg.norm(value) for name, value in theirs.items()}
    least = 0.01 * np.sqrt(sum(norm**2 for norm in norms.values()))
    errors = [
        np.linalg.norm(ours[name] - theirs[name]) / max(norm, least) for name, norm in norms.items()
    ]
    return float(max(errors))


def lora(case: Case, folder: pathlib.Path, tokens_BT) -> float:
    """Return the largest difference of logits under adapters of all layers, opened by peft."""
    import jax
    import peft as theirs
    import transformers

    from dpo_jax.models import lora, peft
    from dpo_jax.models.lora import Lora

    adapters = Lora(rank=3, alpha=12.0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32),
        lora.abstract(case.config, adapters),
    )
    params = jax.device_put(params)
    peft.save(folder, case.config, case.hf_config, adapters, params, base=str(case.folder))
    base = transformers.AutoModelForCausalLM.from_pretrained(
        case.folder, attn_implementation="eager"
    )
    opened = theirs.PeftModel.from_pretrained(base, folder).eval()
    joined = lora.join(case.params, params, adapters.scale)
    return _largest(_logits(case.config, joined, tokens_BT) - _torch_logits(opened, tokens_BT))


def _draw(case: Case, shape, seed: int = 0) -> np.ndarray:
    """Return random tokens that are no special ones."""
    rng = np.random.default_rng(seed)
    return rng.integers(2, case.config.vocab, shape).astype(np.int32)


@functools.cache
def _jitted_logits():
    import jax

    from dpo_jax.models import transformer

    return jax.jit(transformer.logits, static_argnums=0)


def _logits(config, params, tokens_BT) -> np.ndarray:
    return np.asarray(_jitted_logits()(config, params, tokens_BT))


def _torch_logits(model, tokens_BT) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens_BT.astype(int))).logits.numpy()


def _largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max())


def _stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def by_family(rows: list[dict]) -> list[dict]:
    """Return a row for each family: the largest figures of its variants."""
    found = {}
    for row in rows:
        found.setdefault(row["family"], []).append(row)
    merged = []
    for family, variants in found.items():
        one = {name: max(row[name] for row in variants) for name in DIFFERENCES}
        one["export"] = all(row["export"] for row in variants)
        one["greedy"] = np.sum([row["greedy"] for row in variants], axis=0).tolist()
        merged.append(dict(family=family, **one))
    return merged


def table(rows: list[dict], by: str) -> str:
    """Return rows as a Markdown table. by: "variant" or "family", what a row is of."""
    lines = [f"| {by} | {HEADER}", "|---" * (HEADER.count("|") + 1) + "|"]
    for row in rows:
        cells = [
            f"`{row[by]}`",
            f"{row['logits']:.1e}",
            f"{row['logits_back']:.1e}",
            "exact" if row["export"] else "**differs**",
            "{} of {}".format(*row["greedy"]),
            f"{row['gradients']:.1e}",
            f"{row['lora']:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(page: str, new: str) -> str:
    """Return a page with its table of families replaced. ValueError where it has none."""
    header, _, _ = new.partition("\n")
    before, found, rest = page.partition(header)
    if not found:
        raise ValueError(f"{PAGE} has no table that begins with {header!r}")
    _, blank, after = rest.partition("\n\n")
    return before + new + blank + after


def run(variants: list[str]) -> list[dict]:
    """Measure variants; write the rows of all that are measured, and the table of the page."""
    from tests.helpers import tiny_models

    path = RESULTS / "family_parity.json"
    rows = {}
    if path.exists():
        rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    for variant in variants or tiny_models.VARIANTS:
        rows[variant] = measure(variant)
        print(table([rows[variant]], "variant").splitlines()[-1], flush=True)
    # In the order of the table there; a variant that is gone loses its row.
    rows = [rows[variant] for variant in tiny_models.VARIANTS if variant in rows]
    path.write_text(json.dumps(dict(machine=machine(), rows=rows), indent=1) + "\n")
    path.with_suffix(".md").write_text(results_page(rows))
    PAGE.write_text(with_table(PAGE.read_text(), table(by_family(rows), "family")))
    return rows


def results_page(rows: list[dict]) -> str:
    """Return the rows as a page."""
    largest = max(row["largest_logit"] for row in rows)
    return (
        "# Families beside transformers\n\n"
        "`python -m experiments.family_parity`: tiny random models, float32, on a CPU; its first "
        "lines say what is measured. Differences of logits are absolute (logits are up to "
        f"{largest:.0f}), errors of gradients relative.\n\n{table(rows, 'variant')}\n"
    )


def main():
    from absl import flags

    from dpo_jax import command_line
    from dpo_jax.parallel import processes
    from tests.helpers.quick_compiles import QUICK_COMPILES

    # Compiling takes most of the time; each program runs once or twice.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILES}"
    variants = flags.DEFINE_list(
        "variants", [], "Variants of tests/helpers/tiny_models.py; default: all."
    )
    processes.start()
    command_line.run(lambda: run(variants.value), __doc__)


if __name__ == "__main__":
    main()
