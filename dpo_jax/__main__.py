"""dpo-jax COMMAND: the commands under one name; python -m dpo_jax COMMAND is the same."""

import importlib
import sys

from dpo_jax import stopping, surroundings

COMMANDS = {
    "data": "look at a data set: what it is read as, lengths, repeats, what a cut costs",
    "train": "train a model: all stages of a config, one after the other",
    "sweep": "train at several values of a field, and compare them",
    "runs": "list the runs of a folder: what differs, how they ended",
    "report": "one page about the runs of a folder: curves, what they point to, samples",
    "check": "verify what the runs of a folder have left: checkpoints, models, pairs, records",
    "sample": "sample completions from a model for a file of prompts",
    "score": "log-probs and implicit rewards of a file of pairs or completions",
    "plan": "memory, time and cost of a run on TPUs or GPUs, before it starts",
}
# The command's module, where it has another name: dpo_jax.data is the package of all data code.
MODULES = {"data": "data_report"}
HELP = ("help", "--help", "-h")


def main():
    """Start the command that the first argument names."""
    # Before any import that takes long: a signal ends it with one line, and libraries look for the
    # home folder when they are imported. `python -m` has done so already.
    surroundings.prepare()
    stopping.end_at_once()
    from dpo_jax import command_line, config_files

    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in HELP:
        try:
            print(usage(), flush=True)
        except BrokenPipeError:
            command_line.end_by_broken_pipe()
        sys.exit(0)
    if name not in COMMANDS:
        similar = config_files.nearest(name, COMMANDS)
        hint = f"Did you mean dpo-jax {similar[0]}? " if similar else ""
        sys.stderr.write(
            f"error: dpo-jax {name}: there is no such command. {hint}The commands are "
            f"{', '.join(COMMANDS)}.\n"
        )
        sys.exit(2)
    # A command reads sys.argv, and says this name in its messages.
    sys.argv = [f"dpo-jax {name}", *sys.argv[2:]]
    importlib.import_module(f"dpo_jax.{MODULES.get(name, name)}").main()


def usage() -> str:
    """Return the list of commands, a line each."""
    lines = ["dpo-jax COMMAND [FLAGS]: Direct Preference Optimization in JAX and Flax", ""]
    lines += [f"  {name:<8}{what}" for name, what in COMMANDS.items()]
    lines += ["", "dpo-jax COMMAND --help lists the flags of a command."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
