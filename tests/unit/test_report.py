"""The report of runs: what stands on the page, also of odd, damaged and hostile files."""

import fcntl
import json
import os
import subprocess
import sys

import pytest

from dpo_jax import report
from dpo_jax.reporting.page import PLOTS
from dpo_jax.training.metric_names import METRICS
from tests.helpers import bucket_folders
from tests.helpers.documented import anchors
from tests.helpers.html_pages import Page
from tests.helpers.paths import ROOT
from tests.helpers.stage_folders import write_stage

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;"


def rows(steps=20, every=5, *, margin=1.0, **more) -> list[dict]:
    """Return rows of a run on pairs."""
    found = [{"step": 0, "loss/eval": 0.6931, "rewards_eval/accuracies": 0.0}]
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "loss/train": 0.7 - 0.01 * step,
            "grad_norm": 1.0,
            "lr": 1e-6,
            "step_time": 0.5,
            "tokens_per_second": 1000.0,
            "rewards_train/margins": margin,
            "logps_train/chosen": -50.0,
            "logps_train/rejected": -60.0,
        }
        if step % every == 0:
            row |= {"loss/eval": 0.7 - 0.01 * step, "rewards_eval/accuracies": 0.75}
            row |= {"frontier/reward": 0.1 * step, "frontier/kl": 0.2 * step}
        found.append(row | more)
    return found


def page_of(*workdirs, out=None) -> Page:
    out = out or workdirs[0] / "report.html"
    report.write(list(workdirs), out)
    return Page(out.read_text())


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "toy"


def write_evaluation(workdir, completions, references=None, folder="evaluate"):
    path = write_stage(workdir, folder, "evaluate", done={"frontier/reward": 1.0})
    for name, found in (("completions", completions), ("reference_completions", references)):
        if found is not None:
            (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def test_page_of_a_run(workdir):
    ledger = {"train": {"kept": 64, "dropped": {"empty": 3}}, "eval": {"kept": 8}}
    folder = write_stage(workdir, "dpo", "dpo", fields={"dpo.beta": "0.5"}, rows=rows(), done={})
    (folder / "ledger.json").write_text(json.dumps(ledger))
    page = page_of(workdir)
    assert page.ids == ["friend", "runs", "stage-dpo", "ledger", "config"]
    text = page.text
    for words in (
        "dpo dpo finished 2026-01-02 03:04 20 of 20 10 s 0.5 0.75",
        "Loss training 0.5 held out 0.5",
        "Log-probs of chosen and rejected, nats chosen -50 rejected -60",
        "KL to the reference, nats held-out prompts 4",
        "dropped.empty 3",
        "kept 64 8",
        "dpo.beta 0.5 2",  # the toy's own value
        "nothing found dpo : finite numbers, gradient, loss against the start, margins",
    ):
        assert words in text, words
    assert page.elements.count("figure") == 11


def test_page_loads_nothing_and_its_links_resolve(workdir):
    ledger = {"train": {"kept": 10, "responses_truncated": 9}}
    folder = write_stage(workdir, "dpo", "dpo", rows=rows(margin=9.0), done={})
    (folder / "ledger.json").write_text(json.dumps(ledger))
    write_evaluation(workdir, [dict(prompt="p", completion="c", reward=1.0)])
    page = page_of(workdir)
    assert page.loaded == [] and "script" not in page.elements
    assert len(page.ids) == len(set(page.ids))
    inner = {link[1:] for link in page.links if link.startswith("#")}
    assert inner == set(page.ids)
    outer = [link for link in page.links if not link.startswith("#")]
    assert len(outer) >= 2
    for link in outer:
        file, _, heading = link.partition("#")
        path = (workdir / file).resolve()
        assert path.parent == ROOT / "docs" and heading in anchors(path)
    text = (workdir / "report.html").read_text()
    assert "content=\"default-src 'none'; style-src 'unsafe-inline';" in text


def test_links_from_a_folder_of_an_odd_name(tmp_path, monkeypatch):
    """A browser reads # and % of a link, and not of a folder's name."""
    docs = tmp_path / "a#b c%20é" / "docs"
    docs.mkdir(parents=True)
    monkeypatch.setattr(report, "DOCS", docs)
    link = report._link(tmp_path / "report.html", "metrics.md#ppo")
    assert link == "a%23b%20c%2520%C3%A9/docs/metrics.md#ppo"


def test_texts_of_data_are_no_html(workdir):
    """Completions, names of folders, configs, ledgers and metrics may come from anybody."""
    name = EVIL.replace("/", "∕")  # no file's name holds a slash
    evil_rows = rows(steps=5)
    evil_rows[-1][EVIL] = 1.0
    folder = write_stage(workdir, name, "dpo", fields={"data.path": EVIL}, rows=evil_rows)
    (folder / "ledger.json").write_text(json.dumps({"train": {EVIL: {EVIL: 1}}, EVIL: EVIL}))
    config = json.loads((folder / "config.json").read_text())
    config["changes"] = [dict(field=EVIL, step=1, old=EVIL, new=EVIL)]
    config["depends_on"][EVIL] = EVIL
    config["config"]["dpo"][EVIL] = EVIL
    (folder / "config.json").write_text(json.dumps(config))
    broken = workdir / f"broken{name}"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    completion = dict(prompt=EVIL, completion=EVIL, reward=1.0)
    write_evaluation(workdir, [completion], [completion], folder=f"evaluate-{name}")
    config = json.loads((workdir / f"evaluate-{name}" / "config.json").read_text())
    config["stage"] = "evaluate"

    page = page_of(workdir)
    assert page.loaded == [] and not {"script", "img"} & set(page.elements)
    assert page.text.count("alert(1)") > 10


def test_stage_of_a_hostile_name(workdir):
    folder = write_stage(workdir, "dpo", "dpo", rows=rows(steps=5))
    config = json.loads((folder / "config.json").read_text())
    config["stage"] = 'x" onclick="alert(1)'
    (folder / "config.json").write_text(json.dumps(config))
    page = page_of(workdir)
    assert page.loaded == [] and "stage-x--onclick--alert-1-" in page.ids


def test_completions_side_by_side(workdir):
    policy = [dict(prompt=f"p{i}", completion=f"of the policy {i}", reward=i) for i in range(20)]
    references = [row | dict(completion=f"of the reference {row['reward']}") for row in policy]
    write_evaluation(workdir, policy, references)
    text = page_of(workdir).text
    assert "p7 policy, reward 7 of the policy 7 reference, reward 7 of the reference 7" in text
    assert "p8" not in text


def test_completions_without_those_of_the_reference(workdir):
    """Runs from before they were kept have none."""
    write_evaluation(workdir, [dict(prompt="p", completion="c" * 5000)])
    text = page_of(workdir).text
    assert "reference c" not in text and "ccc and 3,500 characters more" in text


def test_completions_of_another_prompt_are_not_compared(workdir):
    write_evaluation(
        workdir, [dict(prompt="p", completion="c")], [dict(prompt="q", completion="elsewhere")]
    )
    assert "elsewhere" not in page_of(workdir).text


def test_run_that_is_still_going(workdir):
    folder = write_stage(workdir, "dpo", "dpo", rows=rows(steps=7))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "loss/tr')  # being written
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = page_of(workdir).text
    assert "Still running: dpo" in text and "dpo dpo running at step 7 of 240 7 of 240" in text
    assert "damaged" not in text
    assert "Still running" not in page_of(workdir).text


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "dpo: metrics.jsonl has no row yet."),
        (b"\x00\xff\n[1]\n7\n", "dpo: 3 of 3 lines of metrics.jsonl are damaged and left out."),
        (b'{"step": 1}\n{"step": "x"}\n{"step": true}\n', "dpo: 2 of 3 lines of metrics.jsonl"),
        (b'{"step": 1, "lr": NaN, "loss/train": Infinity, "grad_norm": "x"}\n', ""),
        (b'{"step": 1, "lr": null, "loss/train": [1]}\n', ""),
        (b'{"step": 1, "lr": 1e308}\n{"step": 2, "lr": -1e308}\n', ""),
        (b'{"step": 1, "lr": %d}\n' % 10**400, ""),
        (b'{"step": 5, "lr": 1}\n{"step": 1, "lr": 2}\n', ""),
        (b'{"step": %d, "lr": 1}\n' % 10**400, "dpo: 1 of 1 lines of metrics.jsonl"),
        (b'{"step": -1, "lr": 1}\n', "dpo: 1 of 1 lines of metrics.jsonl"),
        (b'{"step": %d, "step_time": 1e99}\n' % 10**99, ""),
        (b'{"step": 1, "grad_norm": 1e-320}\n{"step": 2, "grad_norm": 1e300}\n', ""),
        (b"[" * 100_000 + b"\n", "dpo: 1 of 1 lines of metrics.jsonl"),
    ],
)
def test_damaged_metrics(workdir, content, words):
    folder = write_stage(workdir, "dpo", "dpo")
    (folder / "metrics.jsonl").write_bytes(content)
    assert words in page_of(workdir).text


NO_COUNT = "ledger.json has numbers that are no counts, left out: {name}."
NO_ROW = "1 of 2 rows of {name} have no prompt or completion and are left out; the first is row 1."
NO_REWARD = "1 of 2 rows of {name} have a reward that is no finite number and is left out"


@pytest.mark.parametrize(
    "content, words",
    [
        *((content, "ledger.json is not a JSON object") for content in (b"", b"\xff", b"[]")),
        (b"[" * 100_000, "ledger.json is not a JSON object"),
        *((content, "") for content in (b"{}", b'{"train": 3}', b'{"eval": {"kept": "x"}}')),
        (b'{"eval": {"kept": -5}}', NO_COUNT.format(name="eval.kept")),
        (b'{"eval": {"kept": %d}}' % 10**400, NO_COUNT.format(name="eval.kept")),
        (b'{"train": {"kept": 5, "x": Infinity}}', NO_COUNT.format(name="train.x")),
        (b'{"train": {"dropped": {"x": NaN}}}', NO_COUNT.format(name="train.dropped.x")),
        (None, "ledger.json cannot be read: [Errno 21] Is a directory"),
    ],
)
def test_damaged_ledger(workdir, content, words):
    folder = write_stage(workdir, "dpo", "dpo", rows=rows())
    write(folder / "ledger.json", content)
    text = page_of(workdir).text
    assert words in text and "20 of 240" in text
    assert words or "ledger.json" not in text


def write(path, content: bytes | None) -> None:
    """Write a file; None: a folder of its name, which cannot be opened as one."""
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["completions.jsonl", "reference_completions.jsonl"])
@pytest.mark.parametrize(
    "line, words",
    [
        *((line, NO_ROW) for line in (b"", b"\xff", b"[]", b"{}", b'{"prompt": {}}')),
        (b'{"prompt": "p0", "completion": "", "reward": "high"}', NO_REWARD),
        (b'{"prompt": "p0", "completion": "", "reward": Infinity}', NO_REWARD),
        (b'{"prompt": "p0", "completion": "", "reward": %d}' % 10**400, NO_REWARD),
        (b'{"prompt": {}, "completion": [1], "reward": null}', ""),
        (None, "{name} cannot be read: [Errno 21] Is a directory"),
    ],
)
def test_damaged_completions(workdir, name, line, words):
    """The other rows are shown."""
    both = [dict(prompt=f"p{i}", completion=f"c{i}", reward=1.0) for i in range(2)]
    write_evaluation(workdir, both, both)
    second = json.dumps(both[1]).encode()
    write(workdir / "evaluate" / name, None if line is None else line + b"\n" + second + b"\n")
    text = page_of(workdir).text
    assert words.format(name=name) in text
    assert words or "completions.jsonl" not in text
    kept = "" if line is None and name == "completions.jsonl" else "p1 policy, reward 1 c1"
    assert kept in text
    assert ("reference, reward 1 c1" in text) == (line is not None)


@pytest.mark.parametrize(
    "field, value",
    [
        *(("model", 5), ("model.lora", 5), ("model.lora.rank", "x"), ("dpo", 5)),
        *(("dpo.max_grad_norm", "x"), ("dpo.warmup_steps", "x"), ("dpo.warmup_steps", 10**400)),
        *(("dpo.steps", "x"), ("dpo.batch_size", -1), ("dpo.lr", None), ("dpo.lr", float("nan"))),
        *(("dpo.beta", float("inf")), ("dpo.loss", 5), ("dpo.reference_every", "x")),
    ],
)
def test_config_of_wrong_types(workdir, field, value):
    found = rows()
    for row in found[1:]:
        row |= {"param_norm": 1.0, "rewards_train/accuracies": 0.75, "lengths_train/chosen": 9.0}
        row |= {"lengths_train/rejected": 1.0}
    folder = write_stage(workdir, "dpo", "dpo", rows=found)
    config = json.loads((folder / "config.json").read_text())
    block = config["config"]
    *parents, name = field.split(".")
    for parent in parents:
        block = block[parent]
    block[name] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert "Loss training 0.5 held out 0.5" in page_of(workdir).text


def test_changes_of_a_wrong_type(workdir):
    folder = write_stage(workdir, "dpo", "dpo", rows=rows())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(changes=5)))
    text = page_of(workdir).text
    assert "dpo: cannot be read: config.json has 'changes' that are none of a run" in text


def test_result_that_is_not_finite(workdir):
    for index, value in enumerate((float("inf"), 10**400, "x")):
        done = dict(evaluation={"frontier/reward": value, "frontier/kl": 0.25})
        write_stage(workdir, f"evaluate-{index}", "evaluate", done=done)
    assert page_of(workdir).text.count("03:04 0.25") == 3


def test_unreadable_stage_is_a_line(workdir):
    write_stage(workdir, "dpo", "dpo", rows=rows())
    (workdir / "sft").mkdir()
    (workdir / "sft" / "config.json").write_text("{")
    assert "sft: cannot be read: config.json is not JSON" in page_of(workdir).text


def test_config_of_another_version(workdir):
    folder = write_stage(workdir, "dpo", "dpo", rows=rows())
    config = json.loads((folder / "config.json").read_text())
    config["stage"] = config["config"]["stages"][-2] = "grpo"
    config["config"]["grpo"] = config["config"].pop("dpo")
    (folder / "config.json").write_text(json.dumps(config))
    assert "its defaults are not known" in page_of(workdir).text


def test_several_runs_lie_over_each_other(workdir):
    for beta in (0.1, 0.5, 5.0):
        write_stage(
            workdir,
            f"dpo-beta{beta}",
            "dpo",
            fields={"dpo.beta": str(beta), "run": f"dpo-beta{beta}"},
            rows=rows(margin=beta),
            done={},
        )
    page = page_of(workdir)
    assert page.ids.count("stage-dpo") == 1
    text = page.text
    assert "run dpo.beta steps loss" in text  # what differs, and the last numbers
    assert "dpo-beta0.5 0.5 20 of 20 0.5" in text
    assert "Margin, training dpo-beta0.1 0.1 dpo-beta0.5 0.5 dpo-beta5.0 5" in text
    assert "Log-probs of rejected, nats, training dpo-beta0.1 -60" in text


def test_several_workdirs(tmp_path):
    for name in ("first", "second"):
        write_stage(tmp_path / name, "dpo", "dpo", rows=rows(), done={})
    page = page_of(tmp_path / "first", tmp_path / "second", out=tmp_path / "both.html")
    assert "Loss, held out first/dpo 0.5 second/dpo 0.5" in page.text
    assert page.ids.count("stage-dpo") == 1


def test_ppo(workdir):
    found = [
        {"step": step, "loss/train": 0.01, "ppo_train/reward": 0.1 * step, "ppo_train/kl": 20.0}
        for step in range(1, 11)
    ]
    write_stage(workdir, "ppo", "ppo", "toy:ppo_gt", rows=found, done={})
    text = page_of(workdir).text
    assert "The KL is 20 nats at the end, and target_kl is 3." in text
    assert "Reward of PPO's completions training 1" in text
    assert "1* 20*" in text  # of training steps


def test_rounds_lie_over_each_other(workdir):
    write_stage(workdir, "dpo", "dpo", rows=rows(), done={})
    write_stage(
        workdir / "round_2", "dpo", "dpo", fields={"rounds": "2"}, rows=rows(margin=3.0), done={}
    )
    page = page_of(workdir)
    assert "Margin, training dpo 1 round_2/dpo 3" in page.text
    assert page.ids.count("stage-dpo") == 1


def test_every_metric_is_drawn_or_left_out_on_purpose():
    drawn = {metric for plot in PLOTS for metric in plot.metrics}
    left_out = {
        # They follow from the steps, or from the tokens a second.
        *("counters/examples", "counters/updates", "examples_per_second"),
        # The noisier estimate of the KL, and standard errors.
        *("frontier/kl_sampled", "frontier/kl_sampled_se", "frontier/kl_se"),
        "rewards_eval/accuracies_se",
        "frontier/reward_se",
        # A property of the data.
        "kto_{split}/desirable",
    }
    assert drawn.isdisjoint(left_out) and drawn | left_out == set(METRICS)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="no run has left anything there"):
        report.write([tmp_path], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_long_run_makes_a_small_page_soon(workdir):
    write_stage(workdir, "dpo", "dpo", rows=rows(steps=20_000, every=1000))
    began = os.times().user
    page_of(workdir)
    assert os.times().user - began < 4
    assert (workdir / "report.html").stat().st_size < 500_000


def command(*arguments, cwd) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "dpo_jax", "report", *arguments],
        cwd=cwd,
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": path},
    )


def test_command(tmp_path):
    for name in ("first", "second"):
        write_stage(tmp_path / name, "dpo", "dpo", rows=rows(), done={})
    both = command("first", "second", "--out=both.html", cwd=tmp_path)
    assert (both.returncode, both.stdout, both.stderr) == (0, "both.html\n", "")
    assert "first, second" in Page((tmp_path / "both.html").read_text()).text
    refused = command("first", "second", cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr == (
        "error: dpo-jax report with several WORKDIRs: say where the page goes, --out=FILE.html.\n"
    )


def test_end_of_a_run_writes_the_page(workdir, capsys):
    write_stage(workdir, "dpo", "dpo", rows=rows(), done={})
    with report.at_end(workdir):
        assert not (workdir / "report.html").exists()
    assert Page((workdir / "report.html").read_text()).ids
    assert f"report: {workdir}/report.html" in capsys.readouterr().out


def test_end_by_a_loss_that_is_not_finite_writes_the_page(workdir):
    write_stage(workdir, "dpo", "dpo", rows=rows(steps=3))
    with pytest.raises(FloatingPointError), report.at_end(workdir):
        raise FloatingPointError("dpo stopped at step 4")
    assert "stopped at step 3" in (workdir / "report.html").read_text()


def test_stop_by_a_number_that_is_not_finite_is_a_warning(workdir):
    folder = write_stage(workdir, "dpo", "dpo", rows=rows(steps=3))
    stopped = dict(reason="dpo stopped at step 4: param_norm is inf")
    (folder / "stopped.json").write_text(json.dumps(stopped))
    page = page_of(workdir)
    assert "friend would say ! dpo dpo stopped at step 4: param_norm is inf" in page.text
    for content in (b"", b"[]", b'{"reason": 5}'):
        (folder / "stopped.json").write_bytes(content)
        assert "param_norm" not in page_of(workdir).text


def test_a_page_that_cannot_be_written_fails_no_run(workdir, capsys):
    write_stage(workdir, "dpo", "dpo", rows=rows(), done={})
    (workdir / "report.html").mkdir()
    with report.at_end(workdir):
        pass
    said = capsys.readouterr().out
    assert f"warning: {workdir}/report.html was not written (" in said
    assert f"dpo-jax report {workdir} tries again" in said


def test_a_bug_in_the_page_fails_no_run(workdir, capsys, monkeypatch):
    monkeypatch.setattr(report, "page", lambda *_: {}["gone"])
    write_stage(workdir, "dpo", "dpo", rows=rows(), done={})
    with report.at_end(workdir):
        pass
    assert "was not written ('gone')" in capsys.readouterr().out


def test_report_in_a_bucket(tmp_path, monkeypatch):
    bucket = tmp_path / "buckets" / "bucket"
    write_stage(bucket / "run", "dpo", "dpo", rows=rows(margin=9.0), done={})
    bucket_folders.use(monkeypatch, tmp_path / "buckets", tmp_path / "copies")
    folder = report._pulled("s3://bucket/run")
    report.write([folder], folder / "report.html")
    written = bucket / "run" / "report.html"
    page = Page(written.read_text())
    assert "s3://bucket/run" in page.text and str(tmp_path) not in page.text
    # It is read from anywhere, so that docs/ of this machine are not linked.
    assert all(link.startswith("#") for link in page.links)
    assert "docs/metrics.md#a-healthy-dpo-run" in page.text

    # A run that ends writes it there too, and a page of this machine may tell of a bucket.
    written.write_text("an old one")
    with report.at_end("s3://bucket/run"):
        pass
    assert Page(written.read_text()).ids == page.ids
    report.write([report._pulled("s3://bucket/run")], tmp_path / "here.html")
    assert "s3://bucket/run" in Page((tmp_path / "here.html").read_text()).text
