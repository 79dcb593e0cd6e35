"""The notebook runs as it is, in an empty folder and without a network."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT, python_path

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
HAS_JUPYTER = all(importlib.util.find_spec(name) for name in ("nbclient", "ipykernel"))

AS_JUPYTER = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbformat.validate(notebook)
nbclient.NotebookClient(notebook, timeout=600).execute()
for cell in notebook.cells:
    for output in cell.get("outputs", []):
        print(output.get("text", ""), end="")
        if output.get("name") == "stderr":
            print("STDERR", output["text"], file=sys.stderr)
"""
AS_SCRIPT = """
import json, sys
namespace = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), namespace)
"""


def test_notebook_runs(tmp_path):
    """In Jupyter where it is installed; else its code, cell by cell."""
    code = AS_JUPYTER if HAS_JUPYTER else AS_SCRIPT
    env = os.environ | dict(
        PYTHONPATH=python_path(ROOT), HF_HUB_OFFLINE="1", JAX_NUM_CPU_DEVICES="1"
    )
    if not HAS_JUPYTER:
        env["MPLBACKEND"] = "Agg"  # Jupyter's own draws into the notebook
    done = subprocess.run(
        [sys.executable, "-c", code, str(NOTEBOOK)],
        cwd=tmp_path,
        env=env,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "STDERR" not in done.stderr
    lines = done.stdout.splitlines()
    (first,) = [line for line in lines if line.startswith("first loss")]
    assert float(first.split(":")[1]) == pytest.approx(0.6931, abs=1e-3)
    (accuracy,) = [line for line in lines if line.startswith("held-out accuracy")]
    assert float(accuracy.split(":")[1]) > 0.8
    counts = {
        line.partition(":")[0]: float(line.split()[1])
        for line in lines
        if line.startswith(("before:", "after:"))
    }
    assert counts["after"] > counts["before"] + 0.5
    assert not list(tmp_path.iterdir())  # it writes to a folder of its own


def test_notebook_has_no_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
