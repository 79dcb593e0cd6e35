"""README, docs/ and configs: commands parse, links resolve, generated pages are fresh."""

import ast
import dataclasses
import functools
import importlib.util
import pathlib
import re
import shlex

import pytest

from dpo_jax import config as configs
from dpo_jax import config_checks, config_files
from dpo_jax.data.packing import Batch
from dpo_jax.loss_table import LOSSES
from dpo_jax.stage_table import STAGES
from dpo_jax.training.metric_names import METRICS
from tests.helpers.documented import anchors, documented_metrics
from tests.helpers.paths import ROOT

README = ROOT / "README.md"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "tests" / "README.md",
        *(ROOT / "experiments" / "results").rglob("*.md"),
        ROOT / "experiments" / "log.md",
    ]
)
# Pages that show commands to a reader; the others record what was run at some time.
GUIDES = [page for page in PAGES if ROOT / "experiments" not in page.parents]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
LAUNCH = (ROOT / "launch.sh").read_text()
COMMAND = re.compile(r"(?:python -m (?:dpo_jax|experiments|tests)\.|dpo-jax |\./launch\.sh )")


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: pathlib.Path) -> list[str]:
    """Return the lines of a page's code blocks, continued lines joined."""
    found = re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), re.M | re.S)
    return [line for block in found for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]


def docstring(file: pathlib.Path) -> str:
    return ast.get_docstring(ast.parse(file.read_text()))


def indented(text: str) -> list[str]:
    """Return the indented lines of a docstring, in which continued ones are joined already."""
    return [" ".join(line.split()) for line in text.splitlines() if line.startswith("    ")]


def commands() -> list:
    """Return every command of the project that a guide or a config shows, wherever in it."""
    found = []
    for page in [*GUIDES, *CONFIGS]:
        is_config = page.suffix == ".py"
        text = docstring(page) if is_config else page.read_text()
        shown = indented(text) if is_config else blocks(page)
        in_sentences = re.findall(r"`((?:python -m |dpo-jax |\./launch\.sh )[^`]+)`", text)
        for line in [*shown, *in_sentences]:
            line = line.replace("\n", " ").rpartition("&& ")[2].strip()
            if COMMAND.match(line):
                found.append(pytest.param(line, id=f"{name_of(page)}: {line[:60]}"))
    return found


def source_of(module: str) -> str:
    """Return the code of a module, and of the modules it imports that may define flags for it."""
    path = ROOT / module.replace(".", "/")
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    assert file.exists(), f"there is no module {module}"
    text = file.read_text()
    imported = re.findall(r"from ((?:dpo_jax|experiments)[\w.]*) import ([\w, ]+)", text)
    for package, names in imported:
        for name in [part.split(" as ")[0].strip() for part in names.split(",")]:
            for candidate in (f"{package}.{name}", package):
                other = ROOT / f"{candidate.replace('.', '/')}.py"
                if other.exists() and "DEFINE_" in other.read_text():
                    text += other.read_text()
    return text


def split(line: str) -> tuple[str, list[str]]:
    """Return the module that a command line runs, and its arguments."""
    line = re.sub(r"\$\w+", "1", line)  # a shell variable: any value
    words = shlex.split(line, comments=True)
    if words[0] == "python":
        return words[2], words[3:]
    if words[0] == "dpo-jax":
        return f"dpo_jax.{words[1]}", words[2:]
    module = "dpo_jax.sweep" if "sweep" in words else "dpo_jax.train"
    if words[1] == "slurm":  # what stands before the config is srun's
        first = next(i for i, word in enumerate(words) if word.startswith("--config="))
        return module, words[first:]
    return module, words[1:]


@pytest.mark.parametrize("line", commands())
def test_command_parses(line):
    """The module is there, and has the flags; the config is there, and has the fields."""
    module, arguments = split(line)
    if "..." in arguments or "|" in module:  # a form, not a command
        return
    source, config, overrides = source_of(module), None, {}
    for argument in arguments:
        name, _, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or argument == "--help":
            continue
        if name == "config":
            config = config_files.load(value)
        if name.startswith("config."):
            overrides[name.removeprefix("config.")] = value
        elif not (line.startswith("./launch.sh") and re.search(rf" --{name}(=\*)?\)", LAUNCH)):
            # absl has the name alone, argparse with its dashes.
            assert f'"{name}"' in source or f'"--{name}"' in source, f"{module} has no --{name}"
    if config is not None:
        config_files.override(config, overrides)
    else:
        assert not overrides, "fields of a config without --config"
    if config is not None and module in ("dpo_jax.train", "dpo_jax.sweep", "dpo_jax.plan"):
        config_checks.validate(config)
    for argument in arguments:
        if argument.startswith("--sweep="):
            field, _, values = argument.removeprefix("--sweep=").partition("=")
            assert config_files.has_field(config, field) and values


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_scripts_and_test_folders_exist(page):
    for line in blocks(page):
        for path in re.findall(r"python (?:-m pytest )?([\w/]+(?:\.py)?)(?= |$)", line):
            assert (ROOT / path).exists(), line


@pytest.mark.parametrize("file", CONFIGS, ids=name_of)
def test_paths_in_config_docstrings_exist(file):
    for path in re.findall(
        r"\b(?:configs|docs|dpo_jax|experiments|tests)/[\w/.]*\w", docstring(file)
    ):
        assert (ROOT / path).exists(), path


def test_readme_has_the_two_commands():
    text = README.read_text()
    toy = "python -m dpo_jax.train --config=configs/toy.py --workdir=runs/toy"
    assert f"\npip install -r requirements.txt && {toy}\n" in text
    test = "pip install -r requirements.txt -r requirements-dev.txt && python -m pytest"
    assert f"\n{test}\n" in text


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_resolve(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):  # another site
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{target}: there is no {path}"
        assert not anchor or anchor in anchors(path), f"{target}: no such heading"


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_files_named_in_the_text_exist(page):
    for name in re.findall(r"`([\w/]+\.(?:py|sh))`", page.read_text()):
        places = [page.parent / name, ROOT / name, ROOT / "dpo_jax" / name]
        in_rooms = (ROOT / "dpo_jax").rglob(name) if "/" not in name else []
        if name == "utils.py":  # of which there is none
            continue
        assert any(place.exists() for place in [*places, *in_rooms]), name


# In a message that a page quotes: names, numbers and words that the code fills in.
FILLED_IN = re.compile(r"gs://\S*|\b[A-Z][A-Z_]*\b|\b(?:process|written)\b|\d+|[()]")


def quoted_messages(page: pathlib.Path) -> list[str]:
    """Return what the first column of a page's tables of failures quotes from the code."""
    tables = re.findall(r"^\| printed \|.*?\n\n", page.read_text() + "\n", re.M | re.S)
    cells = [line.split(" | ")[0] for table in tables for line in table.splitlines()[2:] if line]
    ours = [cell for cell in cells if not cell.endswith("from kubectl")]
    return [message for cell in ours for message in re.findall(r"`([^`]+)`", cell)]


@functools.cache
def texts_of_the_code() -> str:
    """Return all strings of the package, holes for what is filled in, and the shell scripts."""
    found = [LAUNCH, (ROOT / "launch" / "slurm.sh").read_text()]
    for path in (ROOT / "dpo_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "{}" for part in node.values
                ]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


@pytest.mark.parametrize("message", quoted_messages(ROOT / "docs" / "first_pod.md"))
def test_quoted_message_is_in_the_code(message):
    pieces = [piece.strip(" .,:'|") for piece in FILLED_IN.split(message)]
    long = [piece for piece in pieces if len(piece) >= 5]
    if not long:  # a flag, or a word alone
        assert message.startswith("--")
    for piece in long:
        assert piece in texts_of_the_code(), message


def test_failures_are_quoted():
    assert len(quoted_messages(ROOT / "docs" / "first_pod.md")) > 30


def test_architecture_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in (ROOT / "dpo_jax").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"`{path.name}/`" in text, path.name
        elif path.suffix == ".py" and path.name != "__init__.py":
            assert f"`{path.name}`" in text, path.name


def test_readme_maps_every_room():
    text = README.read_text()
    for path in (ROOT / "dpo_jax").iterdir():
        assert not (path / "__init__.py").exists() or f" {path.name}/ " in text, path.name


def test_index_names_every_page():
    text = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name}" in text, page.name


def load_script(name: str):
    """Return a script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_config_reference_has_no_drift():
    script = load_script("config_reference")
    fresh = script.page()
    assert script.PAGE.read_text() == fresh, "run: python docs/config_reference.py"


def test_licences_are_of_all_dependencies():
    script = load_script("licences")
    page = script.PAGE.read_text()
    for name in script.direct():
        assert f"| {script._normal(name)} | " in page, "run: python docs/licences.py"


def test_config_reference_has_every_field():
    script = load_script("config_reference")
    page = script.PAGE.read_text()
    for field, _, _ in configs.field_docs():
        names = (field, f"STAGE.{field.rpartition('.')[2]}")
        assert any(f"| `{name}` |" in page for name in names), field


def test_table_of_objectives_is_that_of_the_losses():
    """Every loss, with its reference and numbers, and every stage that trains."""
    page = (ROOT / "docs" / "methods.md").read_text()
    section = page.partition("## What each objective needs\n")[2].partition("\n## ")[0]
    stages, told = set(), {}
    for line in re.findall(r"^\| `.*$", section, re.M):
        _, names, _, reference, numbers, _ = line.split("|")
        stage, *losses = re.findall(r"`(\w+)`", names)
        stages.add(stage)
        for loss in losses:
            told[loss] = (reference.strip() != "no", tuple(re.findall(r"`(\w+)`", numbers)))
    assert stages == {name for name, stage in STAGES.items() if stage.trains} | {"best_of_n"}
    assert told == {name: (loss.needs_reference, loss.numbers) for name, loss in LOSSES.items()}


def test_every_metric_is_explained():
    names = {"step"}
    for name in METRICS:
        names |= {name.format(split=split) for split in ("train", "eval")}
    assert documented_metrics() == names


def test_runs_page_names_free_fields():
    text = (ROOT / "docs" / "runs.md").read_text()
    for field in configs.FREE:
        assert f"`{field}`" in text, field


def test_drawings_have_no_drift():
    script = load_script("drawings")
    for name, draw in script.PICTURES.items():
        assert (script.HERE / name).read_text() == draw(), "run: python docs/drawings.py"


def test_drawing_names_batch_fields():
    fields = {field.name for field in dataclasses.fields(Batch)}
    text = (ROOT / "docs" / "packed_batch.svg").read_text()
    named = set(re.findall(r">(\w+_\w+)<", text))
    assert named and named <= fields


def test_drawings_name_files_that_exist():
    for name in load_script("drawings").PICTURES:
        for file in re.findall(r"[\w/]+\.py", (ROOT / "docs" / name).read_text()):
            assert (ROOT / "dpo_jax" / file).exists(), file


def test_add_a_family_shows_the_code():
    page = (ROOT / "docs" / "add_a_family.md").read_text()
    shown = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    families = (ROOT / "dpo_jax" / "models" / "families.py").read_text()
    tiny_models = (ROOT / "tests" / "helpers" / "tiny_models.py").read_text()
    assert len(shown) == 5
    for block in shown:
        assert block in families or block in tiny_models, block
