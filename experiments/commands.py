"""Command lines of experiments that make several runs of one config.

--config=NAME or NAME:SIZE, --config.FIELD=VALUE for every run that has the field
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from dpo_jax import config_files


def config_maker(choice: str, overrides: dict[str, str]) -> Callable[[str], ConfigDict]:
    """Return a function from a method to its config, of NAME or NAME:SIZE.

    overrides: field -> text; a config takes those that it has a field for. Raises ValueError for a
    field that no method has, and where NAME already names a method.
    """
    name, _, size = choice.partition(":")
    methods = list(config_files.load_module(config_files.find(name)).METHODS)

    named = [word for word in size.split(",") if word in methods]
    if named:
        raise ValueError(
            f"--config={choice}: the experiment itself chooses the methods; leave out "
            f"{', '.join(named)}."
        )

    def load(method: str) -> ConfigDict:
        words = [word for word in (size, method) if word]
        return config_files.load(f"{name}:{','.join(words)}")

    def make(method: str) -> ConfigDict:
        config = load(method)
        own = {
            field: text
            for field, text in overrides.items()
            if config_files.has_field(config, field)
        }
        config_files.override(config, own)
        return config

    configs = [load(method) for method in methods]
    for field in overrides:
        if not any(config_files.has_field(config, field) for config in configs):
            block = field.partition(".")[0]
            nearest = next((config for config in configs if block in config), configs[0])
            raise ValueError(config_files.unknown_field(nearest, field))
    return make
