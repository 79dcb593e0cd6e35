"""Command lines of experiments that make several runs of one config file.

--config=FILE or FILE:SIZE, --config.FIELD=VALUE for every run that has the field
"""

import ast
import importlib.util
import re
from collections.abc import Callable


def load_module(path: str):
    """A config file as a module."""
    spec = importlib.util.spec_from_file_location("experiment_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_maker(path: str, arguments: list[str]) -> Callable:
    """method -> its config, of FILE or FILE:SIZE, with the arguments, --config.FIELD=VALUE, that it
    has a field for.

    Raises ValueError for an argument that is something else, or that no method has a field for.
    """
    file, _, size = path.partition(":")
    module, overrides = load_module(file), dict(map(_override, arguments))

    if named := set(size.split(",")) & set(module.STAGES):
        raise ValueError(
            f"--config={path}: the experiment itself chooses methods: leave out {', '.join(named)}."
        )

    def make(method: str):
        config = module.get_config(",".join(filter(None, (size, method))))
        config.update_from_flattened_dict(
            {name: value for name, value in overrides.items() if _has(config, name)}
        )
        return config

    for name in overrides:
        if not any(_has(make(method), name) for method in module.STAGES):
            raise ValueError(f"--config.{name}: no run of {path} has such a field.")
    return make


def _override(argument: str) -> tuple[str, object]:
    if not (found := re.fullmatch(r"--config\.([\w.]+)=(.*)", argument)):
        raise ValueError(f"{argument}: expected --config.FIELD=VALUE, or a flag that --help names.")
    return found[1], parsed(found[2])


def parsed(text: str):
    """A number, True, False or a tuple, or else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _has(config, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(config, "keys") or part not in config:
            return False
        config = config[part]
    return True
