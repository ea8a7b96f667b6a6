"""The report of a real run with three restarts, and of runs made by hand."""

import errno
import hashlib
import json
import os
import re
from pathlib import Path

import pytest
from browser import Browser, what_is_missing

import tiny
from trainstack.__main__ import main
from trainstack.history import goodput
from trainstack.history.attempts import attempts_of, read_executions
from trainstack.report import page as page_file
from trainstack.run.folder import RunFolder
from trainstack.storage import files

STEPS = 40
SECRET = "hf_thisIsATokenThatNobodyMaySee0123456"


@pytest.fixture(scope="module")
def run(home) -> Path:
    """A run of four attempts: killed twice, stopped, and ended."""
    settings = ("run.name=reported", f"train.max_steps={STEPS}", "log.logging_steps=1")
    for fault in ("kill:rank=0,step=8", "kill:rank=0,step=17", "term:step=27"):
        tiny.train(home, 1, *settings, "--fault", fault, check=False)
    tiny.train(home, 1, *settings)
    folder = home / "runs/reported"
    environment = {
        "git_commit": "abc",
        "git_difference": f"+TOKEN={SECRET}\n-old\n",
        "packages": {},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    assert main(["report", "reported", "--home", str(home)]) == 0
    return folder


def data_of(page: Path) -> dict:
    """The figures as another program would read them."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])


@pytest.fixture(scope="module")
def facts(run) -> dict:
    return data_of(run / "report.html")["runs"][0]


@pytest.fixture(scope="module")
def page(run):
    """The page in a browser."""
    if missing := what_is_missing():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{missing}. With CI=true that is a failure.")
        pytest.skip(f"a real browser cannot run here: {missing}")
    with Browser() as browser:
        browser.resize(1200)
        browser.open(run / "report.html")
        yield browser


def test_the_data_has_the_run_as_its_files_have_it(run, facts, home):
    losses, held_out = tiny.metrics(home, "reported"), tiny.metrics(home, "reported", "eval_loss")
    for key, measured in (("loss", losses), ("eval_loss", held_out)):
        curve = facts["curves"][key]
        assert curve["step"] == [*measured]
        assert curve["value"] == pytest.approx([*measured.values()], rel=1e-5)
        assert sorted(curve["at"]) == curve["at"]
    assert (facts["state"], facts["step"], facts["max_steps"]) == ("DONE", STEPS, STEPS)
    begins = [e["step"] for e in RunFolder(run).events() if e["event"] == "training"]
    assert [restart["step"] for restart in facts["restarts"]] == begins[1:] and len(begins) == 4
    assert len(facts["rows"]) == 4 and facts["redone_steps"] > 0
    assert sum(facts["spent"].values()) == pytest.approx(facts["end"] - facts["begin"], abs=0.01)
    assert facts["ledger"]["code"] == 0
    assert "repeated = 0, skipped = 0" in "\n".join(facts["ledger"]["lines"])
    assert facts["checkpoints"][-1]["step"] == STEPS and facts["checkpoints"][-1]["bytes"] > 0
    sample = (run / "sample.txt").read_text().rstrip("\n")
    assert facts["samples"][-1] == {"step": STEPS, "text": sample}
    assert [one["step"] for one in facts["samples"]] == [*held_out], "some steps came again"
    assert facts["settings"]["run.name"] == "reported"


def test_the_time_by_cause_is_that_of_goodput_which_reads_every_step(run, facts):
    folder = RunFolder(run)
    executions = read_executions(run / "samples.jsonl")
    attempts = attempts_of(folder.events(), executions)
    spent = goodput.timeline_of_run(folder, folder.events(), attempts).spent
    assert facts["spent"] == pytest.approx(spent, abs=0.002)


def test_an_uncommitted_change_is_counted_but_not_shown(run, facts):
    assert facts["environment"]["uncommitted_lines"] == 2
    assert SECRET not in (run / "report.html").read_text()


def test_uplot_is_what_its_readme_says():
    folder = tiny.ROOT / "trainstack/report/uplot"
    said = dict(re.findall(r"\| `([\w.]+)` \| `(\w{64})` \|", (folder / "README.md").read_text()))
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in said}
    assert said == found and {*said, "README.md"} == {path.name for path in folder.iterdir()}


def test_the_licence_of_what_draws_the_curves_is_in_the_page(run):
    text = (run / "report.html").read_text()
    assert "The MIT License (MIT)" in text and "Leon Sorokin" in text


def test_the_page_asks_for_nothing_and_its_console_is_empty(page, run):
    assert page.asked_for() == [(run / "report.html").as_uri()]
    assert page.complaints() == []


FIND = """(() => {
  const { chart } = report.charts.find(({ key }) => key === "%s");
  chart.root.scrollIntoView();
  const box = chart.over.getBoundingClientRect();
  return [Math.min(box.left + chart.valToPos(%s, "x"), box.right - 1), box.top + 50];
})()"""
LEGEND = """
  [...report.charts.find(({ key }) => key === "%s").chart.root.querySelectorAll(".u-value")]
    .map((cell) => cell.textContent.trim())"""


@pytest.mark.parametrize("step", [1, 20, STEPS])
def test_what_the_mouse_points_at_is_the_value_of_that_step(page, home, step):
    page.move_mouse(*page.run(FIND % ("loss", step)))
    shown, loss, held_out = page.run(LEGEND % "loss")
    assert shown == str(step)
    assert float(loss) == pytest.approx(tiny.metrics(home, "reported")[step], rel=1e-4)
    measured = tiny.metrics(home, "reported", "eval_loss")
    nearest = min(measured, key=lambda at: abs(at - step))
    assert float(held_out) == pytest.approx(measured[nearest], rel=1e-4)
    # The cursors of all plots move together.
    assert page.run(LEGEND % "grad_norm")[0] == str(step)


INKED = """report.charts.map(({ key, chart }) => {
  const probe = document.createElement("canvas").getContext("2d");
  probe.fillStyle = chart.series[1].stroke(chart, 1);
  probe.fillRect(0, 0, 1, 1);
  const ink = probe.getImageData(0, 0, 1, 1).data;
  const x = Math.round(chart.valToPos(chart.data[0][9], "x", true));
  const y = Math.round(chart.valToPos(chart.data[1][9], "y", true));
  const near = chart.ctx.getImageData(x - 2, y - 2, 5, 5).data;
  let least = 999;
  for (let i = 0; i < near.length; i += 4) if (near[i + 3] > 99) {
    least = Math.min(least, Math.abs(near[i] - ink[0]) + Math.abs(near[i + 1] - ink[1])
      + Math.abs(near[i + 2] - ink[2]));
  }
  return [key, least];
})"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_plot_has_its_marks_where_its_values_are(page, theme):
    page.run(f"setTheme('{theme}')")
    distances = dict(page.run(INKED))
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second"} <= distances.keys()
    assert max(distances.values()) < 30, distances


def test_the_curves_can_be_drawn_against_tokens_time_and_on_a_log_scale(page, facts):
    last = "report.charts[0].chart.data[0].at(-1)"
    try:
        page.run("document.querySelector('input[value=tokens]').click()")
        assert page.run(last) == STEPS * 8 * tiny.SEQ_LEN
        page.run("document.querySelector('input[value=time]').click()")
        assert page.run(last) == pytest.approx(facts["curves"]["loss"]["at"][-1] - facts["begin"])
        page.run("document.querySelector('#log').click()")
        assert page.run("report.charts[0].chart.scales.y.distr") == 3
        assert page.complaints() == []
    finally:
        page.run("document.querySelector('#log').click()")
        page.run("document.querySelector('input[value=step]').click()")


def test_the_page_says_what_happened_in_words(page):
    text = page.run("document.body.innerText")
    for words in ("reported", "DONE", "steps redone", "Where the time went", "training",
                  "redone", "attempt 4", "repeated = 0, skipped = 0", "What it says"):  # fmt: skip
        assert words in text
    assert "used exactly once?\n\nYes." in text.replace("\n\n\n", "\n\n")
    assert page.run("document.documentElement.scrollWidth <= innerWidth")


def test_nothing_is_wider_than_a_narrow_screen(page):
    page.resize(420)
    assert page.run("document.documentElement.scrollWidth") <= 420


# --- Runs made by hand


def make(home: Path, name: str, lines: str, **settings) -> RunFolder:
    """A run that wrote some lines of metrics.jsonl."""
    run = RunFolder(home / "runs" / name)
    run.create()
    run.set_status("FAILED", step=3, max_steps=9, cause="<b>it</b> </script> broke")
    run.add_event("attempt", job="7", attempt=1)
    run.add_event("failed", job="7", attempt=1, step=3, cause="it broke")
    (run.path / "metrics.jsonl").write_text(lines)
    text = "".join(f"  {key}: {value}\n" for key, value in settings.items())
    (run.path / "config.yaml").write_text(f"optim:\n{text}" if text else "")
    return run


LINE = '{"step": 1, "loss": 2.5, "tokens_seen": 16, "tokens_per_second": 9, "step_seconds": 1}\n'


def test_what_a_run_lacks_is_left_out_and_its_texts_never_become_markup(tmp_path):
    run = make(tmp_path, "young", LINE + '{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    assert main(["report", str(run.path)]) == 0
    (found,) = data_of(run.path / "report.html")["runs"]
    assert [*found["curves"]] == ["loss", "tokens_per_second"]
    assert found["curves"]["loss"]["step"] == [1] and found["measured"]["loss"] is None
    assert found["cause"] == "<b>it</b> </script> broke"
    assert "<b>it" not in (run.path / "report.html").read_text()
    assert found["ledger"]["code"] == 0 and "no step is durable" in found["ledger"]["lines"][1]


def test_all_that_a_run_may_have_is_shown(tmp_path, page):
    more = {"mfu": 0.41, "slowest_ratio": 1.2, "source_tokens": {"books": 300, "code": 100}}
    first = json.loads(LINE)
    lines = [
        first | more,
        first | more | {"step": 2, "mfu": 0.42},
        {"step": 2, "eval_loss": 3, "source_eval_loss": {"books": 2.9, "code": 3.4}},
    ]
    run = make(tmp_path, "whole", "".join(f"{json.dumps(line)}\n" for line in lines))
    for kind in ("skip", "rollback", "save_failed"):
        run.add_event(kind, step=2, cause="because")
    run.add_event("slow_rank", step=2, cause="rank 5 on n7: twice as long")
    run.add_event("sample", step=1, text="first words")
    run.add_event("sample", step=2, text="better words")
    assert main(["report", str(run.path)]) == 0
    before = len(page.complaints())
    page.open(run.path / "report.html")
    text = page.run("document.body.innerText")
    for words in (
        "FAILED", "</script> broke", "save failed: because", "slow rank: rank 5 on n7", "books",
        "75.0 %", "first words", "better words", "held-out of code", "MFU", "Slowest rank",
    ):  # fmt: skip
        assert words in text
    assert [c["key"] for c in page.run("report.charts.map(({ key }) => ({ key }))")] == [
        "loss", "tokens_per_second", "mfu", "slowest_ratio"
    ]  # fmt: skip
    assert page.complaints()[before:] == []


def test_several_runs_are_compared_in_one_page_beside_the_runs(tmp_path, capsys, page):
    for name, rate in (("a", 0.1), ("b", 0.2)):
        make(tmp_path, name, LINE, learning_rate=rate, adam_beta1=0.9)
    assert main(["report", "a", "b", "--home", str(tmp_path)]) == 0
    written = tmp_path / "reports" / "a+b.html"
    assert capsys.readouterr().out == f"{written}\n"
    rates = [run["settings"]["optim.learning_rate"] for run in data_of(written)["runs"]]
    assert rates == [0.1, 0.2]
    before = len(page.complaints())
    page.open(written)
    settings = "[...document.querySelectorAll('section')].map((each) => each.innerText)"
    differ = next(text for text in page.run(settings) if text.startswith("Settings that differ"))
    assert "optim.learning_rate\t0.1\t0.2" in differ and "adam_beta1" not in differ
    assert page.run("report.charts[0].chart.data.length") == 3
    assert page.complaints()[before:] == []


def test_each_of_many_runs_of_a_comparison_has_a_look_of_its_own(tmp_path, page):
    names = [f"run-{number}" for number in range(12)]
    for name in names:
        make(tmp_path, name, LINE)
    assert main(["report", *names, "--home", str(tmp_path)]) == 0
    assert main(["report", *names[:5], "--home", str(tmp_path)]) == 0
    assert main(["report", *names[:3], names[9], names[10], "--home", str(tmp_path)]) == 0
    written = sorted((tmp_path / "reports").iterdir())
    assert [path.name.rpartition("-")[0] for path in written] == [
        "run-0+run-1+run-2+2-more", "run-0+run-1+run-2+2-more", "run-0+run-1+run-2+9-more"
    ]  # fmt: skip
    page.open(written[-1])
    looks = page.run("RUNS.map((_, i) => lookOf(i).ink + lookOf(i).kind)")
    assert len({*looks}) == 12


def test_other_runs_have_a_page_of_another_name(tmp_path):
    for name in ("a", "b-c", "a-b", "c"):
        make(tmp_path, name, LINE)
    assert main(["report", "a", "b-c", "--home", str(tmp_path)]) == 0
    assert main(["report", "a-b", "c", "--home", str(tmp_path)]) == 0
    written = sorted(path.name for path in (tmp_path / "reports").iterdir())
    assert written == ["a+b-c.html", "a-b+c.html"]


def test_no_secret_of_an_error_gets_into_the_page(tmp_path):
    run = make(tmp_path, "told", LINE)
    said = f"it broke with HF_TOKEN={SECRET}1 and https://me:{SECRET}2@host"
    run.set_status("FAILED", step=3, cause=said, next_action=said)
    run.add_event("attempt", job="7", attempt=2)
    run.add_event("training", job="7", attempt=2, step=3)
    run.add_event("hang", job="7", attempt=2, step=3, cause=said)
    assert main(["report", str(run.path)]) == 0
    text = (run.path / "report.html").read_text()
    assert text.count("it broke with HF_TOKEN=... and https://...@host") == 4
    assert SECRET not in text


def test_a_run_of_an_unknown_host_and_a_hostile_name_is_shown(tmp_path, page):
    run = make(tmp_path, "<i>a</i> &amp;".replace("/", ""), LINE)
    run.set_status("RUNNING", step=3, nodes=None)
    run.add_event("training", job="7", attempt=1, step=0)
    assert main(["report", str(run.path)]) == 0
    (found,) = data_of(run.path / "report.html")["runs"]
    assert found["environment"]["nodes"] == [] and found["restarts"] == []
    page.open(run.path / "report.html")
    assert page.run("document.title") == run.path.name
    assert "Environment" in page.run("document.body.innerText")
    assert "redone" not in page.run("document.querySelector('.tiles').innerText")


def test_the_health_of_a_run_is_said_beside_its_state(tmp_path):
    run = make(tmp_path, "unsaved", LINE)
    run.set_status("RUNNING", step=3)
    run.add_event("training", job="7", attempt=1, step=0)
    run.add_event("save_failed", job="7", attempt=1, step=2, cause="disk full, token=abc")
    assert main(["report", str(run.path)]) == 0
    (found,) = data_of(run.path / "report.html")["runs"]
    assert found["meaning"] == "the last save failed: disk full, token=..."
    run.set_status("FAILED", step=3, cause="it broke")
    assert main(["report", str(run.path)]) == 0
    (found,) = data_of(run.path / "report.html")["runs"]
    assert (found["meaning"], found["cause"]) == ("", "it broke")


def forbid(folder: Path):
    """As the file system answers whoever may not write in a folder."""

    def watch(operation, path, _):
        if path.parent == folder and operation == "create":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    return files.watched_by(watch)


def test_the_page_of_a_run_of_somebody_else_is_written_beside_the_runs(tmp_path, capsys):
    run = make(tmp_path, "theirs", LINE)
    with forbid(run.path):
        assert main(["report", "theirs", "--home", str(tmp_path)]) == 0
        said = capsys.readouterr()
        written = tmp_path / "reports" / "theirs.html"
        assert said.out == f"{written}\n" and written.exists()
        assert said.err == f"report: {run.path} is not yours to write in\n"
        with forbid(written.parent):
            assert main(["report", "theirs", "--home", str(tmp_path)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"report: error: {written.parent}/.theirs.html.")
    assert last.endswith(".tmp: Permission denied; ask its owner")


def test_a_run_that_cannot_be_read_is_one_line(tmp_path, capsys):
    run = make(tmp_path, "r", LINE)
    (run.path / "metrics.jsonl").unlink()
    (run.path / "metrics.jsonl").mkdir()
    assert main(["report", "r", "--home", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"report: error: {run.path}/metrics.jsonl: Is a directory; ask its owner"


def test_a_ledger_that_would_take_too_long_is_left_to_the_monitor(tmp_path, monkeypatch):
    run = make(tmp_path, "long", LINE)
    (run.path / "samples.jsonl").write_text('{"step": 1, "attempt": "7.1", "at": 9.5}\n' * 9)
    monkeypatch.setattr(page_file, "LEDGER_BYTES", 100)
    assert main(["report", str(run.path)]) == 0
    (found,) = data_of(run.path / "report.html")["runs"]
    assert found["ledger"]["code"] == 2
    assert found["ledger"]["lines"][0].endswith("to see it: bash monitor.sh long --ledger")


@pytest.mark.parametrize(("asked", "is_written"), [("[html]", True), ("[tensorboard]", False)])
def test_at_the_end_of_a_job_it_is_written_only_if_the_settings_ask_for_it(
    tmp_path, asked, is_written
):
    run = make(tmp_path, "r", LINE)
    (run.path / "config.yaml").write_text(f"log:\n  report_to: {asked}\n")
    assert main(["report", str(run.path), "--if-asked"]) == 0
    assert (run.path / "report.html").exists() == is_written


def test_a_run_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["report", "none", "--home", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("report: error: no run none in ")
