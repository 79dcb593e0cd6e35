"""Uploading a result, to a fake hub."""

import types

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from dpo_jax import config as configs
from dpo_jax.pipeline import push

NAME = "me/llama-dpo"


class FakeHub:
    """An HfApi that writes down its calls, or fails in one of them."""

    calls = []
    failure = None

    def __init__(self, *_, **__):
        pass

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        if self.failure is not None:
            raise self.failure
        return types.SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id, folder_path, **_):
        files = {path.name: path.read_text() for path in folder_path.iterdir()}
        self.calls.append(("upload_folder", repo_id, files))
        return types.SimpleNamespace(commit_url=f"https://hub.example/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(FakeHub, "failure", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    return FakeHub


@pytest.fixture
def workdir(tmp_path):
    """Finished stages, each with a file that names it."""
    for stage in ("sft", "rm", "ppo", "dpo-beta0.5"):
        (tmp_path / stage / "hf").mkdir(parents=True)
        (tmp_path / stage / "hf" / "config.json").write_text(stage)
    return tmp_path


@pytest.mark.parametrize(
    "stages, run, expected",
    [
        (("sft",), "", "sft"),
        (("sft", "pairs", "rm", "ppo", "evaluate"), "", "ppo"),
        (("pairs", "rm", "best_of_n"), "", "rm"),
        (("sft", "dpo"), "dpo-beta0.5", "dpo-beta0.5"),
    ],
)
def test_push_uploads_last_policy(stages, run, expected, hub, workdir, capsys):
    config = configs.default(stages)
    config.run = run
    push.push(NAME, workdir, config)
    (created, name, options), uploaded = hub.calls
    assert (created, name) == ("create_repo", NAME)
    # Nothing is published before its owner says so; and a second upload finds the repository.
    assert options == dict(private=True, exist_ok=True)
    assert uploaded == ("upload_folder", NAME, {"config.json": expected})
    assert "uploaded: https://hub.example/me/llama-dpo/commit/1" in capsys.readouterr().out


def http_error(status: int) -> Exception:
    # Which HTTP library makes the responses depends on the version of the hub's client.
    response = types.SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("Denied\nRequest id: 7", response=response)


@pytest.mark.parametrize(
    "failure, message",
    [
        (http_error(401), r"nobody is logged in.*\(Denied\).*hf auth login"),
        (
            LocalTokenNotFoundError("Token is required"),
            "nobody is logged in",
        ),
        (http_error(403), "the hub has no me that you may write to.*hf auth whoami"),
        (http_error(404), "the hub has no me that you may write to"),
        (http_error(500), r"the hub refused the upload \(Denied\)"),
        (ConnectionError("no route"), r"could not be reached \(no route\).*the network"),
        (
            OfflineModeIsEnabled("offline mode"),
            "could not be reached.*HF_HUB_OFFLINE",
        ),
    ],
)
def test_push_says_what_to_do(failure, message, hub, workdir):
    hub.failure = failure
    with pytest.raises(RuntimeError, match=message) as raised:
        push.push(NAME, workdir, configs.default(("sft",)))
    text = str(raised.value)
    assert text.startswith(f"--push={NAME}: ")
    assert f"kept in {workdir}: the same command uploads it again" in text


@pytest.mark.parametrize("name", ["llama", "me/", "/llama", "me/a/b", "me/la ma", "./out"])
def test_check_refuses_other_names(name):
    with pytest.raises(ValueError, match=rf"--push={name}: expected OWNER/NAME"):
        push.check(name, configs.default(("sft",)))


def test_check_refuses_run_without_training():
    with pytest.raises(ValueError, match="no stage of this run trains.* pairs"):
        push.check(NAME, configs.default(("pairs",)))


@pytest.mark.parametrize("token", [None, "hf_x"])
def test_check_warns_without_login(token, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    push.check(NAME, configs.default(("sft",)))
    output = capsys.readouterr()
    assert ("nobody is logged in" in output.out + output.err) == (token is None)
