"""A file imports only from lower floors: the map of the README, enforced."""

import ast

import pytest
from conftest import ROOT

FLOORS = [
    ["config", "losses", "metrics", "runtime", "sharding", "data.ledger", "data.layout", "data.toy", "prompts",
     "evaluation.estimate", "evaluation.plots", "evaluation.chat", "evaluation.winrate", "models.safetensors_io",
     "models.known", "hlo", "topologies"],
    ["data.records", "data.batches", "models.attention", "optim", "stages", "peak", "evaluation.judge"],
    ["data.sources", "models.transformer", "evaluation.ngram"],
    ["data.tokenizer", "models.families", "models.lora", "logprobs", "evaluation.exact", "sampler", "flops"],
    ["roofline", "data.dataset", "models.hf", "objectives", "step", "evaluation.policy", "evaluation.toy_report"],
    ["checkpoint", "pretrained", "selfcheck", "models.encoder", "models.peft", "pairs", "scoring"],
    ["fit", "rewards", "reference", "evaluation.best_of_n"],
    ["ppo"],
    ["train", "score", "sample", "plan"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = {".".join(path.relative_to(ROOT / "dpo_jax").with_suffix("").parts): path
         for path in (ROOT / "dpo_jax").rglob("*.py") if path.name != "__init__.py"}
ONLY_IN = {  # library -> the modules that may import it
    "flax.linen": {"models.transformer"},
    "orbax.checkpoint": {"checkpoint"},
    "transformers": {"models.hf", "data.tokenizer", "data.toy"},
    "datasets": {"data.records"},
    "optax": {"optim", "step"},
    "matplotlib": {"evaluation.plots"},
    "openai": {"evaluation.chat"},
}


def imports(path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_file_has_a_floor():
    assert FILES.keys() == FLOOR.keys()


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down_only(name):
    for imported in imports(FILES[name]):
        below = imported.removeprefix("dpo_jax.")
        if imported.startswith("dpo_jax.") and below in FLOOR:
            assert FLOOR[below] < FLOOR[name], f"{name} (floor {FLOOR[name]}) imports {below} (floor {FLOOR[below]})"


@pytest.mark.parametrize("library", ONLY_IN)
def test_each_library_has_its_place(library):
    users = {name for name, path in FILES.items()
             if any(imported == library or imported.startswith(library + ".") for imported in imports(path))}
    assert users <= ONLY_IN[library]


def test_data_knows_no_jax():
    for name, path in FILES.items():
        if name.startswith("data."):
            assert not any(imported.split(".")[0] in ("jax", "flax", "optax") for imported in imports(path)), name


def test_files_hold_one_idea():
    assert not {name: lines for name, path in FILES.items() if (lines := len(path.read_text().splitlines())) > 400}
