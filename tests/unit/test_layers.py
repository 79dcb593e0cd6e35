"""A room imports only from rooms below it, and each library has its place."""

import ast
import pathlib

import pytest

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "dpo_jax"
FLOORS = [  # the rooms and the files beside them, from the ground up
    {
        "data",
        "parallel",
        "storage",
        "command_line",
        "device_command",
        "data_flags",
        "changes",
        "config",
        "config_checks",
        "config_files",
        "loss_table",
        "stage_table",
        "run_name",
        "console",
        "contents",
        "costs",
        "stopping",
        "surroundings",
        "workdir",
        "whole_file",
    },
    {"models"},
    {"sampling"},
    {"rewards"},
    {"training"},
    {"evaluation", "planning", "reporting"},
    {"pipeline"},
    {
        "train",
        "sample",
        "score",
        "plan",
        "sweep",
        "runs",
        "report",
        "check",
        "data_report",
        "api",
        "__main__",
    },
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(
    path for path in PACKAGE.rglob("*.py") if path.parent / path.name != PACKAGE / "__init__.py"
)
# `python -m dpo_jax.data` starts a command of the top floor, and no code imports the file.
ENTRY_POINT = PACKAGE / "data" / "__main__.py"
ONLY_IN = {  # library -> the files that may import it
    "flax.linen": {"models/transformer.py", "models/linear.py", "models/experts.py"},
    "orbax.checkpoint": {"training/checkpoint.py"},
    "transformers": {"models/hf.py", "data/chat.py", "data/tokenizer.py", "data/toy.py"},
    "datasets": {"data/readers.py"},
    "optax": {"training/optim.py", "training/step.py"},
    "matplotlib": {"evaluation/plots.py"},
    "openai": {"evaluation/chat_api.py", "evaluation/untrusted_http.py"},
    "httpx2": {"evaluation/untrusted_http.py"},
}


def imports_of(path: pathlib.Path) -> set[str]:
    """Every module that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> dict[str, set[str]]:
    """The project's modules, and which of them each imports."""
    names = {"dpo_jax." + ".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in FILES}
    return {name: imports_of(path) & names.keys() for name, path in names.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = "__main__" if path == ENTRY_POINT else room_of(path)
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "dpo_jax" and len(parts) > 1:
            assert parts[1] == room or FLOOR_OF[parts[1]] <= FLOOR_OF[room], (
                f"{path} imports {name}"
            )


def test_no_import_circle():
    left = modules()
    while done := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in done}
    assert not left


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_has_its_place(library):
    users = {
        str(path.relative_to(PACKAGE))
        for path in FILES
        if any(name == library or name.startswith(library + ".") for name in imports_of(path))
    }
    assert users <= ONLY_IN[library]


def test_data_imports_no_jax():
    for path in FILES:
        if room_of(path) == "data":
            roots = {name.split(".")[0] for name in imports_of(path)}
            assert not roots & {"jax", "flax", "optax"}, path
