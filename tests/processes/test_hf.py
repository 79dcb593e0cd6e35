"""Two processes load and export one model."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from dpo_jax.models import hf
from tests.helpers.paths import ROOT
from tests.helpers.tiny_models import placed, random_model, save_model
from tests.helpers.tiny_runs import free_port


def assert_same(params, expected):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, expected)


@pytest.fixture(scope="module")
def untied():
    """The same of an untied Llama with grouped heads."""
    return random_model("llama2")


def load(folder, model):
    return hf.load(folder, model[1], placed(model[1]))


TWO_PROCESSES = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))
import pathlib
from dpo_jax.models import export, families, hf, transformer
from dpo_jax.parallel import sharding
folder = pathlib.Path(sys.argv[3])
hf_config = hf.read_config(folder)
config = families.from_hf(hf_config)
mesh = sharding.make_mesh(fsdp=4, data=1)
shardings = sharding.param_shardings(mesh, transformer.abstract(config))
params = hf.load(folder, config, shardings)
kernel = params["layers"]["mlp"]["up"]["kernel"]
assert sum(shard.data.size for shard in kernel.addressable_shards) == kernel.size // 2
options = export.Options(max_shard_bytes=30_000)
hf.save(folder.with_name("out"), config, hf_config, params, options=options)
assert folder.with_name("out").exists()
"""


def test_load_and_save_in_two_processes(untied, tmp_path):
    folder = save_model(untied, tmp_path / "model")
    port = free_port()
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(index), str(port), str(folder)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    assert_same(load(tmp_path / "out", untied), untied[2])
