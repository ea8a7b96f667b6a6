"""A branch: it begins as a checkpoint of its parent, and then needs nothing of it."""

import contextlib
import shutil
import subprocess

import pytest

import tiny
from lab import Lab
from trainstack.checkpoint.names import LATEST, check_not_lost, linked, newest_state
from trainstack.checkpoint.state import STATE, TrainState
from trainstack.config.load import load
from trainstack.data.store import find_stores
from trainstack.errors import ConfigError, Refused
from trainstack.job.inputs import check_further
from trainstack.run import branch
from trainstack.run.folder import RunFolder
from trainstack.run.identity import identity
from trainstack.storage import files, manifest

STABLE = [
    "train.max_steps=40", "optim.lr_scheduler_type=warmup_stable_decay", "optim.warmup_steps=4",
    "optim.lr_scheduler_kwargs={num_decay_steps: 4}", "eval.prompts=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def lab(home, tmp_path_factory):
    return Lab(home, tmp_path_factory.mktemp("lab"), checkpoint__save_total_limit=9)


@pytest.fixture(scope="module")
def parent(lab):
    return lab.train("parent", *STABLE)


def loss_at(trace, step: int) -> float:
    return trace.losses()[step]


def test_a_branch_decays_from_the_middle_of_a_run_and_outlives_it(lab, parent):
    """On the command line, as a person would: with its own schedule, and fewer steps."""
    decay = ["train.max_steps=28", "optim.lr_scheduler_kwargs={num_decay_steps: 8}"]
    made = lab.train("decayed", "run.branch_from=parent@20", *STABLE, *decay)
    assert "run decayed begins as step 20 of run parent" in made.output
    assert "train.max_steps: 40 -> 28" in made.output
    first = made.run.events()[0]
    assert (first["event"], first["parent"], first["step"]) == ("branch", "parent", 20)
    assert {s: x for s, x in made.losses().items() if s <= 21} == {
        s: x for s, x in parent.losses().items() if s <= 21
    }, "the first loss of its own is that of its parent, to the last bit"
    assert loss_at(made, 28) != loss_at(parent, 28)
    assert newest_state(made.run.checkpoints)[1].best_step == 28, "not one of its parent"
    assert "28 steps" in made.ledger() and "attempts: 1\n" in made.ledger()
    spent = tiny.run_command("goodput", made.run.path).stdout
    assert "attempts: 1\n" in spent
    assert all(event["step"] > 20 for event in made.events("checkpoint"))

    lab.train("parent", "train.max_steps=44", *STABLE[1:])  # it continues
    assert "44 steps" in parent.ledger()
    shutil.rmtree(parent.run.path)
    longer = ["train.max_steps=32", "optim.lr_scheduler_kwargs={num_decay_steps: 12}"]
    again = lab.train("decayed", "run.branch_from=parent@20", *STABLE, *longer)
    assert again.run.status()["step"] == 32
    assert "32 steps" in again.ledger()
    shown = subprocess.run(["bash", str(lab.checkout / "monitor.sh"), "decayed"],
                           env=lab.environment(), capture_output=True, text=True)  # fmt: skip
    assert "of run parent, at step 20" in shown.stdout


# --- Without training


def make_run(home, name: str, *steps: int, settings=(), base: str | None = None) -> RunFolder:
    """A run with checkpoints of these steps, as far as a branch looks at it."""
    config = load(home / "config.yaml", [f"run.name={name}", *settings])
    run = RunFolder(home / "runs" / name)
    run.create()
    run.add_event("attempt", job="1", attempt=1)
    (store,) = find_stores(home, config, ())
    for step in steps:
        folder = run.checkpoints / f"checkpoint-{step}"
        files.make_folder(folder / "training")
        state = TrainState.at_start(identity(config, store.name, base), config.model_dump(), [], 1)
        state.step = step
        entries = {STATE: files.write_file(folder / STATE, state.to_json())}
        entries["model.safetensors"] = files.write_file(folder / "model.safetensors", bytes(99))
        manifest.write_manifest(folder, entries)
    return run


def begin(home, *settings: str) -> RunFolder:
    config = load(home / "config.yaml", ["run.name=b", "run.branch_from=a@10", *settings])
    branch.begin(home / "runs" / config.run.name, config)
    return RunFolder(home / "runs" / config.run.name)


def test_it_has_what_its_parent_logged_up_to_there_and_of_a_step_done_twice_the_last(own_home):
    a = make_run(own_home, "a", 10, 20)
    a.leave_out(5, 7)
    a.leave_out(15, 16)
    lines = "".join(f'{{"step": {n}, "loss": 1.0}}\n' for n in range(1, 30))
    (a.path / "metrics.jsonl").write_text(lines)
    done = [(9, "1.1"), (10, "1.1"), (11, "1.1"), (10, "1.2"), (11, "1.2")]
    samples = [f'{{"step": {n}, "samples_hash": "x", "attempt": "{who}", "at": 1}}\n'
               for n, who in done]  # fmt: skip
    (a.path / "samples.jsonl").write_text("".join(samples) + '{"step": 9, "at')
    b = begin(own_home)
    assert [event["event"] for event in b.events()] == ["branch"]
    assert newest_state(b.checkpoints)[0] == 10
    assert [record["step"] for record in b.measurements()] == list(range(1, 11))
    assert (b.path / "samples.jsonl").read_text() == samples[0] + samples[3]
    assert b.left_out() == [{"after": 5, "steps": 2}]
    assert linked(b.checkpoints, LATEST) == b.checkpoints / "checkpoint-10"
    weights = "checkpoint-10/model.safetensors"
    assert (b.checkpoints / weights).samefile(a.checkpoints / weights)
    shutil.rmtree(a.path)
    assert begin(own_home).events() == b.events(), "it has begun, and needs its parent no more"
    assert not list(manifest.damage(b.checkpoints / "checkpoint-10"))


def test_a_file_system_without_hard_links_gets_copies(own_home, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "no")

    a = make_run(own_home, "a", 10)
    monkeypatch.setattr("os.link", refuse)
    b = begin(own_home)
    assert not list(manifest.damage(b.checkpoints / "checkpoint-10"))
    copy = b.checkpoints / "checkpoint-10/model.safetensors"
    assert not copy.samefile(a.checkpoints / "checkpoint-10/model.safetensors")


@pytest.mark.parametrize("change", range(1, 40, 3))
def test_a_submission_that_is_killed_anywhere_is_finished_by_the_next(own_home, change):
    make_run(own_home, "a", 10)
    count = iter(range(1, 1000))

    def die(*_):
        if next(count) >= change:
            raise KeyboardInterrupt

    with files.watched_by(die), contextlib.suppress(KeyboardInterrupt):
        begin(own_home)
    b = begin(own_home)
    assert [event["event"] for event in b.events()] == ["branch"]
    assert newest_state(b.checkpoints)[0] == 10
    assert not list(manifest.damage(b.checkpoints / "checkpoint-10"))


REFUSED = [
    (["run.branch_from=a@15"], "run a has no checkpoint 15; it has steps 10, 20"),
    (["run.branch_from=c@15"], "run c has no checkpoint 15; it has saved none yet"),
    (["run.branch_from=a@20"], r"is damaged \(model.safetensors: .*\); choose another one"),
    (["run.branch_from=a@10", "data.seq_len=16"],
     "run b, a branch of a, cannot continue with data.seq_len=16 .*or begin with its settings:"),
    (["run.name=other"], "run other is there, and no branch of it; choose another run.name"),
    (["run.name=of_a", "run.branch_from=a@20"], "run of_a is a branch of a@10; choose another"),
    (["run.name=a"], "a branch is another run than a; choose another run.name"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "told"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_a_branch_is_refused_in_one_line_and_nothing_is_made(
    own_home, settings, told
):
    a = make_run(own_home, "a", 10, 20)
    make_run(own_home, "other", 10)
    begin(own_home, "run.name=of_a")
    (a.checkpoints / "checkpoint-20/model.safetensors").write_bytes(b"torn")
    with pytest.raises((ConfigError, Refused), match=told) as caught:
        begin(own_home, *settings)
    assert len(caught.value.problems) == 1
    assert not (own_home / "runs/b").exists()


def test_a_run_with_an_adapter_has_branches_too(own_home):
    lora = ["adapter.type=lora", "model.init=pretrained"]
    make_run(own_home, "a", 10, settings=lora, base="c0ffee")
    assert newest_state(begin(own_home, *lora).checkpoints)[0] == 10
    with pytest.raises(Refused, match="adapter.r=4 .the run has 8."):
        begin(own_home, *lora, "adapter.r=4", "run.name=other")


def test_a_name_that_sbatch_refused_once_may_become_a_branch(own_home):
    make_run(own_home, "a", 10)
    run = RunFolder(own_home / "runs" / "b")
    run.create()
    run.add_event("not_submitted", cause="no such partition")
    assert newest_state(begin(own_home).checkpoints)[0] == 10


def test_a_branch_without_a_step_to_make_is_refused(own_home):
    make_run(own_home, "a", 10)
    config = load(own_home / "config.yaml", ["run.name=b", "run.branch_from=a@10"])
    with pytest.raises(ConfigError, match="asks for 10 steps, and run b has made 10; ask for more"):
        check_further(begin(own_home), config, 10, 10)
    check_further(begin(own_home), config, 10, 11)
    check_further(begin(own_home), config, 11, 11)


def test_a_branch_that_submit_did_not_make_does_not_start_from_scratch(own_home):
    result = tiny.train(own_home, 1, "run.name=b", "run.branch_from=a@10", check=False)
    assert result.returncode == 2
    assert "run.branch_from=a@10: submit.sh makes the branch, and did not" in result.stdout
    assert not (own_home / "runs/b/checkpoints").exists()


def test_one_that_lost_its_checkpoint_does_not_start_over(own_home):
    make_run(own_home, "a", 10)
    b = begin(own_home)
    shutil.rmtree(b.checkpoints / "checkpoint-10")
    with pytest.raises(ConfigError, match="run b has lost its checkpoints, the last of step 10"):
        check_not_lost(b.checkpoints, b.events())
