"""What a fixed set of commands makes, written down and compared: for changes that move no bit.

    python -m tests.helpers.goldens record DIR [NAME ...]    before the change, and after it
    python -m tests.helpers.goldens compare BEFORE AFTER     names what differs; exit code 1 if any

`record` runs the commands in DIR and writes DIR/goldens.json: hashes of weights, samples and
scores, rows of metrics, and small JSON files as they are. With names it runs those commands only,
and leaves what the others made before. Both must be recorded on the same machine, since compilers
differ.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

from dpo_jax.training.metric_names import TIMINGS
from tests.helpers.paths import ROOT, SHARED, STORIES
from tests.helpers.tiny_hh import write_dialogues

MANIFEST = "goldens.json"
# What cost.json measures of the machine; its counts are of the run.
MEASURED = ("attempts", "seconds", "step_seconds", "peak_memory", "memory")
LARGEST_JSON = 20_000  # bytes; what is longer is written down as its hash
PAIRS = [
    ("Once upon a time", " there was a little girl named Lily.", " the."),
    ("Tom had a", " big red ball.", " cat dog"),
    ("The sun was", " bright and warm in the sky.", " very very very"),
    ("Lily said", ', "I love you, mom!"', ", no"),
    ("One day, a dog", " ran to the park to play.", " ate a car"),
    ("They went", " home and were happy.", " zzz"),
]


def dpo_flags(data: str) -> list[str]:
    """Return the flags of a short DPO run of the small model on dialogues."""
    fields = {
        "model.path": "model",
        "data.source": "hh",
        "data.path": data,
        "data.max_length": 128,
        "data.max_prompt_length": 64,
        "data.max_rows": 800,
        "dpo.batch_size": 32,
        "dpo.lr": 1e-4,
        "dpo.warmup_steps": 10,
    }
    return ["--config=configs/dpo.py", *(f"--config.{name}={fields[name]}" for name in fields)]


def steps_flags(steps: int, every: int) -> list[str]:
    return [
        f"--config.dpo.steps={steps}",
        f"--config.dpo.eval_every={every}",
        f"--config.dpo.save_every={every}",
    ]


def commands() -> dict[str, list[str]]:
    """Return the commands by name: a module of dpo_jax and its flags, with paths as in DIR."""
    dpo = ["train", *dpo_flags("dialogues"), "--workdir=dpo"]
    toy = ["train", "--workdir=toy"]
    files = ["--model=model"]
    found = {
        "toy": [*toy, "--config=configs/toy.py"],
        "toy_ppo": [
            *toy,
            "--config=configs/toy.py:ppo",
            "--config.run=with_ppo",
            "--config.ppo.steps=10",
        ],
        "dpo": [*dpo, *steps_flags(20, 10), "--config.data.show=2"],
        "dpo_cached": [
            *dpo,
            "--config.run=cached",
            *steps_flags(8, 4),
            "--config.dpo.cache_reference=True",
            "--config.dpo.microbatch_size=16",
        ],
        "dpo_lora": [
            *dpo,
            "--config.run=lora",
            *steps_flags(6, 6),
            "--config.model.lora.rank=4",
        ],
        "dpo_mesh": [
            *dpo,
            "--config.run=mesh",
            *steps_flags(4, 4),
            "--config.mesh.fsdp=2",
            "--config.mesh.tensor=2",
        ],
        "score": ["score", *files, "--data=pairs.jsonl", "--out=scored.jsonl"],
        "sample": [
            "sample",
            *files,
            "--prompts=pairs.jsonl",
            "--out=samples.jsonl",
            "--n=2",
            "--temperature=0.7",
            "--max_new_tokens=24",
        ],
        "sample_greedy": [
            "sample",
            *files,
            "--prompts=pairs.jsonl",
            "--out=greedy.jsonl",
            "--temperature=0",
            "--max_new_tokens=24",
        ],
        "plan_gpu": [
            "plan",
            "--config=configs/tldr.py:pythia1b",
            "--topology=h200:8",
            "--json",
            "--stage=dpo",
        ],
    }
    if SHARED.exists():
        found["real"] = ["train", *dpo_flags("hh-rlhf"), "--workdir=real", *steps_flags(20, 10)]
    if importlib.util.find_spec("libtpu"):
        found["plan_tpu"] = [
            "plan",
            *dpo_flags("dialogues"),
            "--config.mesh.fsdp=4",
            "--topology=v5e-8",
            "--json",
        ]
    return found


def prepare(folder: pathlib.Path) -> None:
    """Write the model, the configs and the data, by names that are the same in every folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"model": STORIES, "configs": ROOT / "configs"}
    if SHARED.exists():
        sources["hh-rlhf"] = SHARED / "hh-rlhf"
    for name, source in sources.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(source)
    if not (folder / "dialogues").exists():
        write_dialogues(folder / "dialogues", count=400)
    # Twice the same, so that there are more rows than a batch has.
    rows = [dict(prompt=p, chosen=c, rejected=r) for p, c, r in PAIRS * 2]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def record(folder: pathlib.Path, names: list[str]) -> int:
    """Run the commands and write the manifest; return how many failed."""
    every = commands()
    if unknown := set(names) - every.keys():
        raise SystemExit(f"no such command: {', '.join(sorted(unknown))}; have {', '.join(every)}")
    if not names and folder.exists():
        shutil.rmtree(folder)
    prepare(folder)
    failed = 0
    for name in names or every:
        module, *flags = every[name]
        devices = "4" if name == "dpo_mesh" else "1"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": devices,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", f"dpo_jax.{module}", *flags],
            cwd=folder,
            env=environment,
            text=True,
            capture_output=True,
        )
        seconds = time.monotonic() - start
        print(f"{name:14} {'ok' if done.returncode == 0 else 'FAILED'} {seconds:.0f} s", flush=True)
        (folder / f"{name}.log").write_text(done.stdout + done.stderr)
        if done.returncode:
            failed += 1
            print(done.stderr[-2000:])
        if module == "plan":
            (folder / f"{name}.json").write_text(done.stdout)
    (folder / MANIFEST).write_text(json.dumps(manifest(folder), indent=1))
    return failed


def digest(data) -> str:
    if not isinstance(data, bytes):
        data = json.dumps(data, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def made_by_commands(folder: pathlib.Path):
    """Yield the files that the commands made; not what they read, nor checkpoints and logs."""
    given = {"model", "configs", "hh-rlhf", "dialogues", "pairs.jsonl", MANIFEST}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        skipped = parts[0] in given or "checkpoints" in parts or path.suffix == ".log"
        if path.is_file() and not skipped and not path.name.endswith(".lock"):
            yield path


def content(path: pathlib.Path):
    """Return what is compared of a file: all that does not depend on time or on place."""
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [digest({k: v for k, v in row.items() if k not in TIMINGS}) for row in rows]
    records = ("done.json", "config.json", "ledger.json", "weights.json", "cost.json")
    if path.name in records or path.name.endswith(".settings.json"):
        record = json.loads(path.read_text())
        left_out = ("finished", "date", "files", "sha256", *MEASURED)
        return {name: value for name, value in record.items() if name not in left_out}
    if path.suffix in (".png", ".html"):
        return "picture"  # matplotlib writes its version and the date into it, a report times
    data = path.read_bytes()
    if path.suffix == ".json" and len(data) < LARGEST_JSON:
        return json.loads(data)
    return digest(data)


def manifest(folder: pathlib.Path) -> dict:
    found = {str(path.relative_to(folder)): content(path) for path in made_by_commands(folder)}
    # Of checkpoints which steps there are: their files hold times.
    for checkpoints in sorted(folder.rglob("checkpoints")):
        steps = sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit())
        found[str(checkpoints.relative_to(folder))] = steps
    return found


def differences(before: dict, after: dict) -> list[str]:
    """Return a line for every entry that differs, and for every field of those that have some."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if name not in after or name not in before:
            lines.append(f"{name}: only {'before' if name in before else 'after'}")
        elif before[name] != after[name]:
            lines.append(f"{name}: differs")
            old, new = before[name], after[name]
            if isinstance(old, dict) and isinstance(new, dict):
                for field in sorted(old.keys() | new.keys()):
                    if old.get(field) != new.get(field):
                        lines.append(f"    {field}: {old.get(field)} -> {new.get(field)}")
            elif isinstance(old, list) and isinstance(new, list):
                equal = sum(a == b for a, b in zip(old, new, strict=False))
                lines.append(f"    {len(old)} -> {len(new)} rows, {equal} of them equal")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record")
    recording.add_argument("folder", type=pathlib.Path)
    recording.add_argument("names", nargs="*")
    comparing = actions.add_parser("compare")
    comparing.add_argument("before", type=pathlib.Path)
    comparing.add_argument("after", type=pathlib.Path)
    asked = parser.parse_args()
    if asked.action == "record":
        return 1 if record(asked.folder, asked.names) else 0
    before, after = (
        json.loads((folder / MANIFEST).read_text()) for folder in (asked.before, asked.after)
    )
    lines = differences(before, after)
    print("\n".join([*lines, f"{len(before)} entries before, {len(after)} after"]))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
