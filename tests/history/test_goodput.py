"""Where the time went: on hand-made histories to the second, and on real runs as a whole."""

import os
import random
import subprocess

import pytest

import tiny
from trainstack.__main__ import main
from trainstack.history import goodput
from trainstack.history.attempts import Execution, attempts_of, read_executions
from trainstack.run.folder import RunFolder
from trainstack.units import seconds_of


def event(kind: str, at: float, **facts) -> dict:
    """An event ``at`` seconds after some midnight."""
    minutes, milliseconds = divmod(round(at * 1000), 60_000)
    stamp = f"1970-01-01T00:{minutes:02d}:{milliseconds / 1000:06.3f}Z"
    return {"event": kind, "at": stamp, "job": "7", **facts}


def steps(attempt: str, **at: float) -> list[Execution]:
    """Executions by ``s3=21.5``: step 3 at 21.5."""
    return [Execution(int(key[1:]), "", attempt, moment) for key, moment in at.items()]


def spent(events: list[dict], executions=(), failures=()) -> dict[str, float]:
    """Seconds by cause, rounded, those of no time left out."""
    attempts = attempts_of(events, executions)
    found = goodput.timeline_of(events, attempts, failures).spent
    return {cause: round(seconds, 3) for cause, seconds in found.items() if seconds}


def test_a_run_that_was_stopped_and_requeued():
    events = [
        event("submitted", 0),
        event("attempt", 10, attempt=1),
        event("start", 13, attempt=1),
        event("evaluation", 18, step=0, seconds=2),
        event("training", 20, step=0),
        event("evaluation", 23.5, step=2, seconds=1),
        event("checkpoint", 24, step=2, stall_seconds=0.25),
        event("checkpoint", 26, step=4, stall_seconds=0.5),
        event("paused", 26.75, step=4, attempt=1),
        event("attempt", 60, attempt=2),
        event("start", 61, attempt=2),
        event("training", 63, step=4),
        event("done", 65, step=5, attempt=2),
    ]
    first = steps("7.1", s1=21, s2=22, s3=24.5, s4=25.5)
    assert spent(events, [*first, *steps("7.2", s5=64)]) == {
        "queue": 10 + 33.25,
        "start": 10 - 2 + 3,
        "evaluation": 2 + 1,
        "save": 0.25 + 0.5,
        "training": 5.5 - 1 - 0.25 + 1,
        "stop": 1.25 - 0.5 + 1,
    }


KILLED = [
    event("attempt", 0, attempt=1),
    event("training", 10, step=0),
    event("checkpoint", 12.5, step=2, stall_seconds=0),
]
KILLED_STEPS = steps("7.1", s1=11, s2=12, s3=13, s4=14)
RESTARTED = [
    event("failed", 18, attempt=1, step=4),
    event("attempt", 19, attempt=2),
    event("training", 25, step=2),
    event("done", 28, step=4, attempt=2),
]
RESTARTED_STEPS = steps("7.2", s3=26, s4=27)


def test_steps_lost_by_a_kill_are_redone_and_the_way_back_is_down_and_start():
    assert spent(KILLED + RESTARTED, KILLED_STEPS + RESTARTED_STEPS) == {
        "start": 10 + 6, "training": 2 + 2, "redone": 2, "down": 5, "stop": 1,
    }  # fmt: skip


def test_steps_that_were_not_put_on_record_are_redone_until_a_rank_reported_that_it_failed():
    failures = [5.0, 16.5, 17.5]  # the first one is of another time
    assert spent(KILLED + RESTARTED, KILLED_STEPS[:2] + RESTARTED_STEPS, failures[1:]) == {
        "start": 10 + 6, "training": 2 + 2, "redone": 4.5, "down": 2.5, "stop": 1,
    }  # fmt: skip
    whole = spent(KILLED + RESTARTED, KILLED_STEPS + RESTARTED_STEPS, failures[1:])
    assert (whole["redone"], whole["down"]) == (4.5, 2.5)


def test_a_failure_of_another_attempt_says_nothing_of_this_one():
    """Attempt 2 is killed as well; the ranks of each say when."""
    events = [
        *KILLED,
        *RESTARTED[:3],
        event("attempt", 40, attempt=3),
        event("training", 45, step=2),
        event("done", 48, step=4, attempt=3),
    ]
    executions = KILLED_STEPS + RESTARTED_STEPS + steps("7.3", s3=46, s4=47)
    whole = {"start": 10 + 6 + 5, "training": 2 + 2, "stop": 1}
    assert spent(events, executions, [16.5, 29, 50]) == {
        **whole, "redone": 4.5 + 4, "down": 2.5 + 11,
    }  # fmt: skip
    assert spent(events, executions, [16.5]) == {**whole, "redone": 4.5 + 2, "down": 2.5 + 13}


def test_ranks_of_jobs_and_by_hand_report_when_they_failed_and_hangs_do_not_count(tmp_path):
    run = RunFolder(tmp_path)
    run.create()
    run.add_failure("7", 1, 0, "FAILED", 1, "RuntimeError", is_victim=False)
    run.add_failure(None, 1, 0, "DIVERGED", 79, "not finite", is_victim=False)
    run.add_failure("7", 2, 0, "HANG", 81, "no progress", is_victim=False)
    run.add_failure("8", 1, 0, "FAILED", 1, "another run's", is_victim=False)
    attempts = attempts_of([event("attempt", 0, attempt=n) for n in (1, 2)], [])
    expected = [*run.failures("7", 1), *run.failures("local", 1)]
    assert sorted(goodput.failure_times(run, attempts)) == sorted(
        seconds_of(record["at"]) for record in expected
    )


def test_a_stall_that_a_kill_cut_short_is_not_taken_from_what_follows():
    events = [*KILLED[:2], event("checkpoint", 12.5, step=2, stall_seconds=3), *RESTARTED]
    assert spent(events, KILLED_STEPS[:2] + RESTARTED_STEPS) == {
        "start": 10 + 6, "training": 2 + 2, "save": 0.5, "down": 6.5, "stop": 1,
    }  # fmt: skip


def test_attempts_by_hand_begin_with_their_start_and_wait_in_no_queue():
    events = [
        event("start", 0, job="local-a", attempt=1),
        event("training", 4, step=0),
        event("paused", 7, step=2, job="local-a", attempt=1),
        event("start", 100, job="local-b", attempt=1),
        event("training", 103, step=2),
        event("done", 105, step=3, job="local-b", attempt=1),
    ]
    executions = steps("local-a.1", s1=5, s2=6) + steps("local-b.1", s3=104)
    assert spent(events, executions) == {"start": 7, "training": 3, "stop": 2, "down": 93}


def test_after_a_failure_only_the_time_from_the_next_submission_on_is_queue():
    events = [
        *KILLED,
        event("failed", 20, attempt=1),
        event("submitted", 90, job="8"),
        event("attempt", 100, job="8", attempt=1),
    ]
    assert spent(events, KILLED_STEPS) == {"start": 10, "training": 4, "down": 76, "queue": 10}


def test_a_stopped_run_that_nobody_requeued_is_down_until_it_is_submitted_again():
    events = [
        event("attempt", 0, attempt=1),
        event("training", 2, step=0),
        event("paused", 4, attempt=1, step=1),
        event("submitted", 50, job="8"),
        event("attempt", 60, job="8", attempt=1),
    ]
    times = spent(events, steps("7.1", s1=3))
    assert times == {"start": 2, "training": 1, "stop": 1, "down": 46, "queue": 10}


def test_the_jobs_of_a_chain_wait_since_the_one_before_has_stopped():
    events = [
        event("submitted", 0),
        event("submitted", 0.5, job="8"),
        event("attempt", 10, attempt=1),
        event("training", 12, step=0),
        event("paused", 14, attempt=1, step=1),
        event("attempt", 30, job="8", attempt=1),
    ]
    times = spent(events, steps("7.1", s1=13))
    assert times == {"queue": 10 + 16, "start": 2, "training": 1, "stop": 1}


def test_a_job_that_began_before_its_submission_was_noted_did_not_wait():
    events = [event("attempt", 0, attempt=1), event("submitted", 0.2), event("training", 5, step=0)]
    assert spent(events, steps("7.1", s1=6)) == {"start": 5, "training": 1}


def test_a_stop_before_the_first_step_is_start_or_stop():
    begin = [event("attempt", 0, attempt=1)]
    paused = event("paused", 8, attempt=1)
    assert spent([*begin, paused]) == {"start": 8}
    assert spent([*begin, event("training", 6, step=0), paused]) == {"start": 6, "stop": 2}


def test_an_attempt_that_died_while_it_started_is_start_until_its_last_sign():
    events = [
        *KILLED,
        event("attempt", 20, attempt=2),
        event("start", 23, attempt=2),
        event("failed", 26, attempt=2),
        *(event(e["event"], 30 + i, attempt=3, step=2) for i, e in enumerate(RESTARTED[1:])),
    ]
    times = spent(events, KILLED_STEPS + steps("7.3", s3=31.5), [24.5])
    assert times == {
        "start": 10 + 4.5 + 1, "training": 2 + 0.5, "redone": 2, "down": 6 + 5.5, "stop": 0.5,
    }  # fmt: skip


def test_the_wait_for_the_last_save_is_stop():
    events = [
        event("attempt", 0, attempt=1),
        event("training", 1, step=0),
        event("evaluation", 4, step=1, seconds=1.5),
        event("checkpoint", 8, step=1, stall_seconds=0.5),
        event("done", 9, step=1, attempt=1),
    ]
    times = spent(events, steps("7.1", s1=2))
    assert times == {"start": 1, "training": 1, "evaluation": 1.5, "save": 0.5, "stop": 5}


def test_a_run_in_the_queue_has_waited_since_its_submission():
    assert spent([event("submitted", 0), event("submitted", 30)]) == {"queue": 30}


def test_without_its_events_an_attempt_begins_with_its_first_step():
    executions = steps("7.1", s1=1, s2=2, s3=3) + steps("7.2", s3=10, s4=11)
    assert spent([], executions) == {"training": 1 + 1, "redone": 1, "down": 7}
    events = [event("attempt", 20, attempt=3), event("training", 22, step=4)]
    assert spent(events, executions + steps("7.3", s5=23)) == {
        "training": 1 + 1 + 1, "redone": 1, "down": 7 + 9, "start": 2,
    }  # fmt: skip


def test_whatever_the_order_of_the_records_no_time_is_negative_and_all_adds_up():
    kinds = "submitted attempt start training evaluation checkpoint paused done failed resume skip"
    for seed in range(300):
        generator = random.Random(seed)
        events = [
            event(
                generator.choice(kinds.split()), generator.uniform(0, 99),
                attempt=generator.randrange(1, 4), step=generator.randrange(9),
                seconds=generator.uniform(0, 30), stall_seconds=generator.uniform(0, 30),
            )
            for _ in range(generator.randrange(1, 25))
        ]  # fmt: skip
        executions = [
            Execution(generator.randrange(1, 9), "", f"7.{attempt}", 99 * generator.random())
            for attempt in generator.choices((1, 2, 3), k=generator.randrange(25))
        ]
        attempts = attempts_of(events, executions)
        failures = [99 * generator.random() for _ in range(3)]
        timeline = goodput.timeline_of(events, attempts, failures)
        found, parts = timeline.spent, [part for row in timeline.rows for part in row]
        begin, end = goodput.bounds(events, attempts)
        assert min(found.values()) >= 0, seed
        assert sum(found.values()) == pytest.approx(end - begin), seed
        moments = [begin, *(moment for _, *moments in parts for moment in moments), end]
        assert moments == pytest.approx(sorted(moments)), seed
        assert moments[::2] == pytest.approx(moments[1::2]), f"{seed}: a gap"


@pytest.fixture(scope="module")
def job(home, tmp_path_factory) -> RunFolder:
    """A job of submit.sh --local one of whose ranks was killed."""
    shared = tmp_path_factory.mktemp("goodput")
    checkout = shared / "checkout"
    tiny.make_checkout(checkout, shared, log__logging_steps=10, log__report_to=["html"])
    for name in ("models", "datasets", "tokens"):
        (shared / "trainstack" / name).symlink_to(home / name)
    fault = "kill:rank=1,step=13"
    environment = {
        **os.environ, "SHARED_DIR": str(shared), "OMP_NUM_THREADS": "1", "TRAINSTACK_FAULT": fault,
        "NPROC_PER_NODE": "2",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(checkout / "submit.sh"), "--local", "run.name=timed"], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"train.slurm: report: {shared}/trainstack/runs/timed/report.html\n" in done.stdout
    return RunFolder(shared / "trainstack/runs/timed")


def table(output: str) -> dict[str, tuple[float, float]]:
    """Seconds and percent by cause."""
    rows = [line.split() for line in output.splitlines()[3:-1]]
    return {row[0]: (float(row[1].replace(",", "")), float(row[2])) for row in rows}


def test_a_job_leaves_a_report_that_knows_its_end(job):
    page = (job.path / "report.html").read_text()
    assert '"state": "DONE"' in page and "repeated = 0, skipped = 0" in page


def test_the_table_of_a_real_job_that_was_interrupted_adds_up(job):
    result = tiny.run_command("goodput", job.path)
    lines = result.stdout.splitlines()
    rows = table(result.stdout)
    events = job.events()
    wall = seconds_of(events[-1]["at"]) - seconds_of(events[0]["at"])
    assert lines[0] == "run timed: DONE, attempts: 2"
    assert lines[1].startswith(f"  wall time {wall:,.1f} s = 00:")
    assert list(rows) == [*goodput.CAUSES, "all"]
    assert rows["all"] == (pytest.approx(wall, abs=0.06), 100)
    assert sum(seconds for seconds, _ in rows.values()) / 2 == pytest.approx(wall, abs=0.5)
    assert sum(percent for _, percent in rows.values()) / 2 == pytest.approx(100, abs=0.5)
    assert min(rows[cause][0] for cause in ("training", "start", "redone", "down")) > 0
    assert rows["queue"] == (0, 0)
    assert lines[-1] == f"  goodput {rows['training'][1]:.1f} % of the wall time"


def test_steps_that_the_job_lost_without_a_record_are_redone_not_down(job):
    """Steps 11 and 12 of the first attempt were executed, but the kill came before their record."""
    events, executions = job.events(), read_executions(job.path / "samples.jsonl")
    attempts = attempts_of(events, executions)
    assert max(e.step for e in attempts[0].executions) == 10
    failures = goodput.failure_times(job, attempts)
    reported = goodput.timeline_of(events, attempts, failures).spent
    unreported = goodput.timeline_of(events, attempts, []).spent
    assert reported["redone"] > unreported["redone"]
    assert sum(reported.values()) == pytest.approx(sum(unreported.values()))


def test_of_a_job_that_ended_for_good_steps_that_no_checkpoint_holds_are_lost(
    job, tmp_path, capsys
):
    run = RunFolder(tmp_path / "failed")
    run.create()
    for kind, step in (("start", None), ("training", 0), ("failed", 2)):
        run.add_event(kind, step=step, job="7", attempt=1, ranks=[])
    begin = seconds_of(run.events()[1]["at"])
    lines = [f'{{"step": {s}, "samples_hash": "", "attempt": "7.1", "at": {begin + s}}}\n'
             for s in (1, 2)]  # fmt: skip
    (run.path / "samples.jsonl").write_text("".join(lines))
    for state, cause in (("RUNNING", "training"), ("FAILED", "redone")):
        run.set_status(state)
        assert main(["goodput", str(run.path)]) == 0
        assert table(capsys.readouterr().out)[cause][0] == 2.0


def test_a_run_without_a_record_and_one_that_is_not_there_are_one_line(tmp_path, capsys):
    run = RunFolder(tmp_path / "runs/young")
    run.create()
    (run.path / "events.jsonl").touch()
    assert main(["goodput", "young", "--home", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "run young: no status; nothing is on record yet\n"
    assert main(["goodput", "old", "--home", str(tmp_path)]) == 2
    error = f"goodput: error: no run old in {tmp_path}/runs; there are: young\n"
    assert capsys.readouterr().err == error


def test_queue_time_is_also_reported_apart(tmp_path, capsys):
    run = RunFolder(tmp_path / "queued")
    run.create()
    lines = [event("submitted", 0), event("attempt", 50, attempt=1), event("training", 75, step=0)]
    for line in lines:
        with (run.path / "events.jsonl").open("a") as file:
            file.write(f"{line}\n".replace("'", '"'))
    (run.path / "samples.jsonl").write_text(
        '{"step": 1, "samples_hash": "", "attempt": "7.1", "at": 100}\n'
    )
    run.set_status("RUNNING")
    main(["goodput", str(run.path)])
    assert capsys.readouterr().out.splitlines()[-1] == (
        "  goodput 25.0 % of the wall time, 50.0 % of that outside the queue"
    )
