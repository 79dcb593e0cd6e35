"""The package's metadata agrees with the requirements files and the folders."""

import re
import tomllib

from tests.helpers.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements(name: str) -> set[str]:
    lines = (ROOT / name).read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def test_packages_are_complete():
    folders = {path.parent for path in (ROOT / "dpo_jax").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names | {"dpo_jax.configs"}


def test_dependencies_are_the_requirements():
    assert PROJECT["project"]["dynamic"] == ["dependencies"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["dependencies"]["file"] == ["requirements.txt"]


def test_extra_is_dev_requirements():
    extras = PROJECT["project"]["optional-dependencies"]
    own = {line for line in extras["test"] if not line.startswith("dpo_jax")}
    named = [line for name in ("judge", "ngram", "gcs", "s3") for line in extras[name]]
    assert own | {*named} == requirements("requirements-dev.txt")
    assert "dpo_jax[judge,ngram,gcs,s3]" in extras["test"]


def test_accelerator_extras_have_same_jax():
    (jax,) = [line for line in requirements("requirements.txt") if re.match(r"jax\W", line)]
    extras = PROJECT["project"]["optional-dependencies"]
    for name in ("tpu", "cuda13"):
        assert extras[name] == [jax.replace("jax", f"jax[{name}]")]
