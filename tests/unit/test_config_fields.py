"""Every field of the config is read somewhere in the package, from the block that it is in."""

import ast

import pytest

from dpo_jax import config as configs
from dpo_jax import stage_table
from dpo_jax.loss_table import LOSSES
from tests.helpers.paths import ROOT

# What modules call the block of the stage that runs, and the dict of its numbers that are traced.
STAGE_BLOCK = {"block", "_block", "stage", "hyper"}
CHECKS = ROOT / "dpo_jax" / "config_checks.py"  # a field that is only checked does nothing


def last_name(node: ast.expr) -> str:
    """Return the last name of an expression: `block` of job.block, `stage` of config[stage]."""
    if isinstance(node, ast.Subscript):
        return last_name(node.slice)
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Constant):
        return str(node.value)
    return getattr(node, "id", "")


def keys_of(node: ast.AST) -> list[tuple[ast.expr, str]]:
    """Return (receiver, name) of what a node reads by name: block.name, block["name"], and so on.

    Also block.get("name") and block[name] for the names of a literal tuple, in a comprehension.
    """
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        return [(node.value, node.attr)]
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        return [(node.value, node.slice.value)] if isinstance(node.ctx, ast.Load) else []
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "get":
        asked = node.args[0] if node.args else None
        return [(node.func.value, asked.value)] if isinstance(asked, ast.Constant) else []
    if isinstance(node, ast.DictComp) and isinstance(node.value, ast.Subscript):
        names = node.generators[0].iter
        if isinstance(names, ast.Tuple):
            return [(node.value.value, name.value) for name in names.elts]
    return []


def reads() -> set[tuple[str, str]]:
    """Return (block, field) of all that the package reads by name."""
    found = set()
    for path in (ROOT / "dpo_jax").rglob("*.py"):
        if path == CHECKS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            found |= {(last_name(receiver), name) for receiver, name in keys_of(node)}
    return found


def fields_of(block, names=()) -> list[tuple[str, ...]]:
    """Return the path of every field: ("model", "lora", "rank")."""
    found = []
    for name, value in block.items():
        # The fields of model.scratch are Hugging Face's, those of data.template the template's.
        if hasattr(value, "items") and name not in ("scratch", "template"):
            found += fields_of(value, (*names, name))
        else:
            found.append((*names, name))
    return found


def is_read(path: tuple[str, ...], found: set[tuple[str, str]]) -> bool:
    *blocks, field = path
    block = blocks[-1] if blocks else "config"
    receivers = {block}
    if block in STAGES:
        receivers |= STAGE_BLOCK
    return any((receiver, field) in found for receiver in receivers)


STAGES = tuple(stage_table.STAGES)
FIELDS = fields_of(configs.default(STAGES))
# A loss is given its numbers by its line in the table; each is a parameter of its function, as
# tests/unit/training/test_losses.py checks.
OF_LOSSES = {("hyper", number) for loss in LOSSES.values() for number in loss.numbers}
READS = reads() | OF_LOSSES


@pytest.mark.parametrize("path", FIELDS, ids=".".join)
def test_field_is_read(path):
    assert is_read(path, READS), f"nothing reads config.{'.'.join(path)}"


@pytest.mark.parametrize(
    "invented", ["colour", "data.shape", "model.parent", "dpo.axes", "dpo.shape", "sampling.loss"]
)
def test_invented_field_is_not_read(invented):
    """Though most of these words are attributes of something else in the package."""
    assert not is_read(tuple(invented.split(".")), READS)
