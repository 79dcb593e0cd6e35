"""What SECURITY.md promises: no code from files, no shell, paths that stay where they are."""

import ast
import io
import json
import pathlib
import pickle
import shutil
import tarfile
import zipfile

import datasets
import numpy as np
import pytest

from dpo_jax import workdir
from dpo_jax.data import readers
from dpo_jax.data import tokenizer as tokenizers
from dpo_jax.models import hf, safetensors_io
from dpo_jax.training import reference_cache
from tests.helpers.paths import ROOT, STORIES
from tests.helpers.rows import pairs, read, write_jsonl

PROGRAMS = [*ROOT.glob("dpo_jax/**/*.py"), *ROOT.glob("experiments/**/*.py")]
# Calls that run code or a shell, or unpack what can: none of them is needed.
FORBIDDEN_CALLS = {
    *("eval", "exec", "os.system", "os.popen", "yaml.load", "torch.load", "joblib.load"),
    *("subprocess.getoutput", "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive"),
}
FORBIDDEN_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
# Keyword -> what it must be wherever it is given.
KEYWORDS = {"trust_remote_code": False, "allow_pickle": False, "shell": False, "verify": True}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.fixture
def ran(tmp_path) -> pathlib.Path:
    """A file that is there once the code of some file was run."""
    return tmp_path / "ran"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_program_runs_no_code_of_files(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None)
            assert not FORBIDDEN_MODULES & {*names, module}, f"{path}:{node.lineno}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in FORBIDDEN_CALLS, f"{path}:{node.lineno}"
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        for name in KEYWORDS.keys() & given.keys():
            assert ast.literal_eval(given[name]) is KEYWORDS[name], f"{path}:{node.lineno}"
        if called in ("np.load", "numpy.load"):
            assert "allow_pickle" in given, f"{path}:{node.lineno}"
        if called == "AutoTokenizer.from_pretrained":
            assert path.is_relative_to(ROOT / "experiments") or "trust_remote_code" in given


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.npy"])
def test_load_never_reads_pickled_weights(name, tmp_path, ran):
    shutil.copytree(STORIES, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / name).write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        list(safetensors_io.read(tmp_path / "model"))
    assert not ran.exists()


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".pt", ".bin", ".npy", ".npz", ".pth"])
def test_data_is_never_unpickled(suffix, tmp_path, ran):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(ValueError, match="is none of .jsonl"):
        read(path)
    assert not ran.exists()


def test_kept_reference_is_never_unpickled(tmp_path, ran):
    path = tmp_path / "train.npy"
    np.save(path, np.array([Payload(ran)], object), allow_pickle=True)
    with pytest.raises(ValueError, match="train.npy|pickle"):
        reference_cache._read(path, (1, 2))
    assert not ran.exists()


@pytest.mark.parametrize("suffix", [".tar", ".zip", ".tgz"])
def test_packed_data_is_never_unpacked(suffix, tmp_path):
    """So that no member of it can leave its folder."""
    path = tmp_path / "data" / f"rows{suffix}"
    path.parent.mkdir()
    text = json.dumps(pairs(1)[0]).encode()
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("../../outside.jsonl", text)
    else:
        with tarfile.open(path, "w") as packed:
            member = tarfile.TarInfo("../outside.jsonl")
            member.size = len(text)
            packed.addfile(member, io.BytesIO(text))
    with pytest.raises((ValueError, FileNotFoundError), match="Unpack it"):
        read(path.parent)
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["data", f"rows{suffix}"]


def test_code_of_model_folder_is_never_run(tmp_path, ran, monkeypatch):
    """Nor is anybody asked at the terminal whether it may, as transformers would."""
    model = shutil.copytree(STORIES, tmp_path / "model")
    (model / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n"
        "from transformers import LlamaConfig, PreTrainedTokenizerFast\n"
        "class Words(PreTrainedTokenizerFast): pass\n"
        "class Config(LlamaConfig): pass\n"
    )
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps(config))
    words = json.loads((model / "tokenizer_config.json").read_text())
    words |= dict(tokenizer_class="Words", auto_map={"AutoTokenizer": ["evil.Words", "evil.Words"]})
    (model / "tokenizer_config.json").write_text(json.dumps(words))

    def ask(*_):
        raise AssertionError("asked whether to run code")

    monkeypatch.setattr("builtins.input", ask)
    assert type(hf.read_config(model)).__module__.startswith("transformers.")
    with pytest.raises(FileNotFoundError, match="never run"):
        tokenizers.load(model)
    assert not ran.exists()


OUTSIDE = ["../outside.arrow", "/etc/passwd", "a/../../outside.arrow", "https://127.0.0.1:9/x"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_saved_set_names_only_its_own_files(name, tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(pairs(3)).save_to_disk(folder)
    shutil.copy(next(folder.glob("*.arrow")), tmp_path / "outside.arrow")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state.json names .* which is not in its folder"):
        read(folder)


@pytest.mark.parametrize("name", OUTSIDE)
def test_saved_splits_are_in_their_folder(name, tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
    with pytest.raises(ValueError, match="dataset_dict.json names"):
        read(folder)


@pytest.mark.parametrize("name", ["../x.jsonl", "/etc/*", "https://127.0.0.1:9/x", "hf://a/b/c"])
def test_card_declares_only_its_own_files(name, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "rows.jsonl", pairs(3))
    write_jsonl(tmp_path / "x.jsonl", pairs(3))
    card = f'---\nconfigs:\n- config_name: default\n  data_files: "{name}"\n---\n'
    (folder / "README.md").write_text(card)
    with pytest.raises(ValueError, match="README.md names"):
        read(folder)


@pytest.mark.parametrize("name", ["../other", "/dev/zero", "hf/../../other"])
def test_done_stage_names_only_its_own_files(name, tmp_path):
    recorded = {name: dict(bytes=0, sha256="")}
    workdir.write_record(tmp_path / "done.json", {"finished": "now", workdir.FILES: recorded})
    with pytest.raises(ValueError, match="done.json names .* which is not in its folder"):
        workdir.check_files(tmp_path)


@pytest.mark.parametrize("revision", ["", "abc123", "refs/pr/7"])
def test_model_is_fetched_at_its_revision(revision, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        hf.HfApi, "model_info", lambda self, name, revision, timeout: asked.append(revision)
    )

    def download(name, revision, **_):
        asked.append(revision)
        return str(tmp_path)

    monkeypatch.setattr(hf, "snapshot_download", download)
    assert hf.fetch("me/mine" + (f"@{revision}" if revision else "")) == tmp_path
    assert asked == [revision or None] * 2


@pytest.mark.parametrize("path", ["me/mine@abc123", "me/mine@refs/pr/7", "me/mine@abc123:small"])
def test_data_is_fetched_at_its_revision(path, monkeypatch):
    """And never from the hub's copy as Parquet, which is of another revision."""
    asked = []
    wanted = path.partition("@")[2].partition(":")[0]

    def info(self, name, timeout, revision):
        asked.append((name, revision))

    def load(name, subset, revision):
        asked.append((name, revision))
        return {"train": datasets.Dataset.from_list(pairs(3))}

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", info)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # it then asks for no info
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(readers.find_splits(path)) == ["train"]
    assert asked == [("me/mine", wanted)] * 2

    def scripted(name, subset, revision):
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr(datasets, "load_dataset", scripted)
    with pytest.raises(FileNotFoundError, match="scripts are no longer supported"):
        readers.find_splits(path)
