"""What the experiments' commands share: configs, flags, WORKDIR in a folder or a bucket, machine.

--config=NAME or --config=NAME:SIZE, then --config.FIELD=VALUE for every run that has the field
"""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator

from ml_collections import ConfigDict

from dpo_jax import config_files


def config_maker(choice: str, overrides: dict[str, str]) -> Callable[[str], ConfigDict]:
    """Return a function from a method to its config, for the choice NAME or NAME:SIZE.

    overrides: field -> text; each config takes those whose field it has. Raises ValueError for a
    field that no method has, and for a choice that already names a method.
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
        words = [size, method] if size else [method]
        return config_files.load(f"{name}:{','.join(words)}")

    def make(method: str) -> ConfigDict:
        config = load(method)
        own = {}
        for field, text in overrides.items():
            if config_files.has_field(config, field):
                own[field] = text
        config_files.override(config, own)
        return config

    # A field that one method lacks may be another's, but one that all lack is a mistake.
    configs = [load(method) for method in methods]
    for field in overrides:
        if any(config_files.has_field(config, field) for config in configs):
            continue
        block = field.partition(".")[0]
        with_block = [config for config in configs if block in config]
        nearest = with_block[0] if with_block else configs[0]
        raise ValueError(config_files.unknown_field(nearest, field))
    return make


def refuse_flags(where: str, *names: str) -> None:
    """Raise ValueError if one of the flags is on the command line, though it would do nothing."""
    from absl import flags

    given = [f"--{name}" for name in names if flags.FLAGS[name].present]
    if given:
        raise ValueError(f"{', '.join(given)} would do nothing {where}.")


def machine() -> dict:
    """Return the CPU's name, its cores, the memory, and the CPU's instructions for bfloat16."""
    fields = {}
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())  # of the first core
    instructions = fields.get("flags", "").split()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return dict(
        cpu=fields.get("model name", "unknown"),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory_bytes / 2**30, 1),
        bfloat16=[name for name in ("amx_bf16", "avx512_bf16") if name in instructions],
    )


@contextlib.contextmanager
def in_workdir(workdir: str, *, dry_run: bool = False) -> Iterator[str]:
    """Yield the folder of this machine that is WORKDIR: of a bucket a copy, pushed in the end.

    dry_run: the copy is only read.
    """
    # Imported late: the commands set what jax reads when it is imported.
    from dpo_jax.storage import shadow
    from dpo_jax.storage.addresses import is_address
    from dpo_jax.workdir import open_workdir

    if not is_address(workdir):
        yield workdir
    elif dry_run:
        folder = shadow.place(workdir)
        shadow.pull(folder, shadow.is_outside_stages)
        yield str(folder)
    else:
        with open_workdir(workdir) as folder:
            yield str(folder)
