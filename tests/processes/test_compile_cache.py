"""Compiled programs that are kept in a bucket."""

import subprocess
import sys

from tests.helpers import bucket_servers
from tests.helpers.paths import ROOT
from tests.helpers.tiny_runs import environment

PROGRAM = """
import jax
from dpo_jax.parallel import processes

found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
processes.start()
print(jax.jit(lambda x: x + 1)(2.0), "/jax/compilation_cache/cache_hits" in found)
"""


def test_compiled_programs_are_kept_in_a_bucket(tmp_path):
    """The second start finds them; a bucket that is not there is one warning."""
    with bucket_servers.gcs(tmp_path) as variables:
        said = []
        for folder in ("gs://bucket/compiled", "gs://bucket/compiled", "gs://missing/compiled"):
            env = environment() | variables | dict(JAX_COMPILATION_CACHE_DIR=folder)
            command = [sys.executable, "-c", PROGRAM]
            done = subprocess.run(
                command, cwd=ROOT, env=env, text=True, capture_output=True, check=True
            )
            said.append((done.stdout, done.stderr))
    assert [out for out, _ in said] == ["3.0 False\n", "3.0 True\n", "3.0 False\n"]
    assert list((tmp_path / "bucket" / "compiled").glob("*"))
    first, second, third = (errors for _, errors in said)
    assert "not kept" not in first + second
    assert third.count("compiled programs are not kept, as gs://missing/compiled cannot be") == 1
    assert "there is no bucket gs://missing" in third and "Traceback" not in third
