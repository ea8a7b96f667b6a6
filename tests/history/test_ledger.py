"""The ledger on real runs that were killed, stopped, rolled back, and on logs that are wrong."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import tiny
from trainstack.__main__ import main
from trainstack.data import order
from trainstack.history import ledger
from trainstack.history.attempts import Execution, attempts_of, last_durable_step
from trainstack.run.folder import RunFolder

STEPS, BATCH = 40, 8
GOOD = "  samples     repeated = 0, skipped = 0"


@pytest.fixture(scope="module")
def run(home) -> Path:
    """A run of three attempts: killed on two processes, stopped on one, ended on four."""
    settings = ("run.name=audited", f"train.max_steps={STEPS}", "log.logging_steps=3")
    killed = tiny.train(home, 2, *settings, "--fault", "kill:rank=0,step=14", check=False)
    assert killed.returncode != 0
    tiny.train(home, 1, *settings, "--fault", "term:step=22", check=False)
    folder = home / "runs/audited"
    assert RunFolder(folder).status()["state"] == "PAUSED"
    tiny.train(home, 4, *settings)
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """The same run in a folder of its own, to be damaged."""
    return shutil.copytree(run, tmp_path / "audited")


@pytest.fixture
def tell(home, capsys):
    """What the ledger prints about a run, and its exit code."""

    def tell(run, home=home) -> tuple[list[str], int]:
        code = main(["ledger", str(run), *(["--home", str(home)] if home else [])])
        captured = capsys.readouterr()
        return (captured.out + captured.err).splitlines(), code

    return tell


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def rewrite(run: Path, change) -> None:
    """Give the last attempt's records to ``change``, which returns those to write instead."""
    lines = records(run)
    last = lines[-1]["attempt"]
    own = change([line for line in lines if line["attempt"] == last])
    kept = [line for line in lines if line["attempt"] != last]
    (run / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept + own))


def test_a_run_that_was_killed_stopped_and_resumed_at_other_sizes_used_every_sample_once(run, home):
    result = tiny.run_command("ledger", "audited", "--home", home)
    lines = records(run)
    redone = len(lines) - STEPS
    assert redone > 0
    assert result.stdout.splitlines() == [
        "run audited: DONE, attempts: 3",
        "  checked     40 steps = 320 samples = 10,240 tokens, 0.67 epochs of 475 samples",
        GOOD,
        f"  redone      {redone} steps on record that interruptions undid "
        f"({redone / len(lines):.1%} of those executed)",
    ]


def test_a_run_is_found_by_its_name_and_by_its_folder(run, home, tell, monkeypatch):
    by_name = tell("audited")
    assert by_name[1] == 0
    assert tell(run, home=None) == by_name
    monkeypatch.setenv("TRAINSTACK_HOME", str(home))
    assert tell("audited", home=None) == by_name
    monkeypatch.chdir(home / "runs")
    monkeypatch.delenv("TRAINSTACK_HOME")
    assert tell("audited", home=None) == by_name


def test_a_step_that_is_not_on_record_was_skipped(copy, tell):
    rewrite(copy, lambda own: [r for r in own if r["step"] not in (26, 30, 31, 32)])
    output, code = tell(copy)
    assert code == 1
    assert "  samples     repeated = 0, skipped = 32" in output
    assert output[-2:] == [
        "    step 26 not on record: the samples count as skipped",
        "    steps 30 to 32 not on record: the samples count as skipped",
    ]


def test_other_samples_than_due_are_skipped_ones_and_repeated_ones(copy, tell):
    def change(own: list[dict]) -> list[dict]:
        hashes = {r["step"]: r["samples_hash"] for r in own}
        other = {27: "0" * 13, 35: hashes[34], 36: hashes[35]}
        return [{**r, "samples_hash": other.get(r["step"], r["samples_hash"])} for r in own]

    due = {r["step"]: r["samples_hash"] for r in records(copy)}[27]
    rewrite(copy, change)
    output, code = tell(copy)
    assert code == 1
    assert "  samples     repeated = 24, skipped = 24" in output
    assert output[-2:] == [
        f"    step 27 consumed other samples than due (step 27: hash 0000000000000, not {due})",
        "    steps 35 to 36 consumed other samples than due (step 35: those of step 34)",
    ]


def test_a_step_twice_within_one_attempt_repeats_its_samples(copy, tell):
    rewrite(copy, lambda own: [r for r in own for _ in range(2 if r["step"] == 33 else 1)])
    output, code = tell(copy)
    assert code == 1
    assert "  samples     repeated = 8, skipped = 0" in output
    attempt = records(copy)[-1]["attempt"]
    assert output[-1] == f"    step 33 executed twice within one attempt ({attempt}): repeated"


def test_a_step_that_only_an_undone_attempt_executed_was_skipped(copy, tell):
    """The next attempt resumed from a checkpoint before that step, and left the step out."""
    lines = records(copy)
    first, second = list(dict.fromkeys(r["attempt"] for r in lines))[:2]
    step = next(r["step"] for r in lines if r["attempt"] == second)
    assert step in [r["step"] for r in lines if r["attempt"] == first]
    kept = [r for r in lines if (r["attempt"], r["step"]) != (second, step)]
    (copy / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    output, code = tell(copy)
    assert code == 1
    assert output[-1] == f"    step {step} not on record: the samples count as skipped"


def test_torn_lines_hide_nothing(copy, tell):
    lines = (copy / "samples.jsonl").read_text().splitlines(keepends=True)
    attempts = [json.loads(line)["attempt"] for line in lines]
    begin = attempts.index(list(dict.fromkeys(attempts))[1])
    lines[begin] = '{"step": 14, "samples_ha' + lines[begin]  # of the killed attempt before
    lines.append('{"step": 41, "samp')
    (copy / "samples.jsonl").write_text("".join(lines))
    output, code = tell(copy)
    assert (output[2], code) == (GOOD, 0)


def test_many_problems_are_the_first_ones_and_a_number(copy, tell):
    rewrite(copy, lambda own: [r for r in own if r["step"] % 2])
    output, code = tell(copy)
    assert code == 1
    missing = [
        step for step in range(1, STEPS + 1) if step not in {r["step"] for r in records(copy)}
    ]
    assert output[-1] == f"    and {len(missing) - ledger.SHOWN} more problems"
    assert output[-1 - ledger.SHOWN].startswith(f"    step {missing[0]} not on record")


def test_without_a_log_every_step_counts_as_skipped(copy, tell):
    (copy / "samples.jsonl").unlink()
    output, code = tell(copy)
    assert code == 1
    assert output[-1] == "    steps 1 to 40 not on record: the samples count as skipped"


def test_what_is_beyond_the_newest_checkpoint_is_not_checked_yet(copy, tell):
    RunFolder(copy).set_status("RUNNING", step=38)
    for step in (40, 35):
        shutil.rmtree(copy / f"checkpoints/checkpoint-{step}", ignore_errors=True)
    newest = last_durable_step(RunFolder(copy).status(), copy / "checkpoints")
    times = {39: 0, newest + 1: 0, 38: 2}
    rewrite(copy, lambda own: [r for r in own for _ in range(times.get(r["step"], 1))])
    output, code = tell(copy)
    assert (output[2], code) == (GOOD, 0)
    assert output[1].startswith(f"  checked     {newest} steps")
    ahead = STEPS - newest - 2
    assert output[-1] == f"  not saved   {ahead} steps beyond step {newest}"


def test_a_run_that_ended_is_checked_by_its_config_when_its_checkpoints_are_gone(copy, tell):
    shutil.rmtree(copy / "checkpoints")
    output, code = tell(copy)
    assert (output[2], code) == (GOOD, 0)
    assert output[1].startswith("  checked     40 steps")


def test_a_config_that_a_refused_attempt_left_does_not_mislead(copy, tell):
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    settings["run"]["seed"] += 1
    (copy / "config.yaml").write_text(yaml.safe_dump(settings))
    output, code = tell(copy)
    assert (output[2], code) == (GOOD, 0)


def test_updates_that_were_not_made_are_mentioned(copy, tell):
    RunFolder(copy).add_event("skip", step=30, cause="a spike")
    output, code = tell(copy)
    text = "steps whose samples were consumed, but whose bad updates were not made: 1"
    assert (output[-1], code) == (f"  no update   {text}", 0)


def test_what_a_rollback_left_out_was_left_out_on_purpose(home, tell, tmp_path):
    settings = ("run.name=rolled", "guard.on_divergence=rollback")
    result = tiny.train(home, 2, *settings, "--fault", "nan:rank=1,step=8", check=False)
    assert "left out" in result.stdout
    tiny.train(home, 2, *settings)
    windows = RunFolder(home / "runs/rolled").left_out()
    steps = sum(window["steps"] for window in windows)
    output, code = tell("rolled")
    assert (output[2], code) == (GOOD, 0)
    text = f"{steps} steps = {steps * BATCH} samples, on purpose, by rollbacks"
    assert f"  left out    {text}" in output

    copy = shutil.copytree(home / "runs/rolled", tmp_path / "rolled")
    (copy / "left_out.json").unlink()
    output, code = tell(copy)
    first, samples = windows[0]["after"] + 1, (20 - windows[0]["after"]) * BATCH
    assert code == 1
    assert f"  samples     repeated = {samples}, skipped = {samples}" in output
    assert output[-1] == (
        f"    steps {first} to 20 consumed other samples than due "
        f"(step {first}: those of step {first + steps})"
    )


def test_before_the_first_checkpoint_there_is_nothing_to_check(tmp_path, tell):
    run = RunFolder(tmp_path / "young")
    run.create()
    run.add_event("submitted", job="7")
    assert tell(run.path) == (
        ["run young: no status, attempts: 0", "  checked     nothing: no step is durable yet"], 0
    )  # fmt: skip


def test_a_run_that_is_not_there_is_one_line(run, home, tell, tmp_path):
    output, code = tell("audit")
    assert code == 2
    assert output[0].startswith(f"ledger: error: no run audit in {home}/runs; there are: ")
    assert "audited" in output[0]  # and what other tests left there
    assert tell(tmp_path) == (
        [f"ledger: error: {tmp_path} is not a run folder: it has no events.jsonl"], 2
    )  # fmt: skip
    assert tell("audit", home=None) == (
        ["ledger: error: audit is not a run folder: it has no events.jsonl; to find a run by its "
         "name: source env.sh, or pass --home"], 2
    )  # fmt: skip


def test_without_the_tokens_it_cannot_be_checked(copy, tell, tmp_path):
    output, code = tell(copy, home=None)
    assert code == 2
    assert len(output) == 2
    assert output[1].startswith("ledger: error: the tokens that the run learned from are not there")
    assert output[1].endswith(
        "; run: bash download_data_model.sh, or pass the --home that has them"
    )


def test_many_steps_at_once_hash_as_one_step_alone():
    windows = [{"after": 3, "steps": 2}, {"after": 9000, "steps": 7}]
    sampler = order.StepOrder(1000, BATCH, 5, left_out=windows)
    hashes = list(ledger.expected_hashes(sampler, 9500))
    assert len(hashes) == 9500
    for step in (1, 3, 4, 5, 8192, 8193, 9000, 9001, 9500):
        assert hashes[step - 1] == f"{order.samples_hash(sampler.all_samples_at(step - 1)):013x}"


def test_attempts_with_the_same_name_are_told_apart_by_their_beginning():
    """In a container every process may have the same id."""
    starts = [
        {"event": "start", "at": f"1970-01-01T00:00:{at}.000Z", "job": "local-box-7", "attempt": 1}
        for at in (10, 20)
    ]
    steps = [(1, 11.0), (2, 12.0), (2, 21.0), (3, 22.0)]
    executions = [Execution(step, "", "local-box-7.1", at) for step, at in steps]
    attempts = attempts_of(starts, executions)
    assert [[e.step for e in attempt.executions] for attempt in attempts] == [[1, 2], [2, 3]]
    assert [[e.step for e in attempt.effective()] for attempt in attempts] == [[1], [2, 3]]
