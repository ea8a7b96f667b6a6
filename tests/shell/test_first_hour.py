"""Mistakes of a first hour: one line, the right exit code, and a fix that works when it is made."""

import re
from collections.abc import Callable

import pytest
from fake_site import SECRET, complaint

TINY = "run: {name: first}\nmodel: {name: tiny}\ndata: {name: tiny}\n"


def write(text: str, name: str = "my.yaml") -> Callable:
    return lambda site: (site.cwd / name).write_text(text)


def nothing(site) -> None:
    pass


MISTAKES = [
    # prepared, typed -> exit code, what the line says; the fix that it names, typed
    (nothing, ["train.micro_batchsize=4"], 2, "did you mean train.micro_batch_size?",
     ["train.micro_batch_size=4"]),
    (nothing, ["lr=1e-3"], 2, "optim.learning_rate", ["optim.learning_rate=1e-3"]),
    (nothing, ["optim.learning_rate=1e-3x"], 2, "not a number", ["optim.learning_rate=1e-3"]),
    (nothing, ["optim.learning_rate=-1"], 2, "a number more than 0.0", ["optim.learning_rate=1"]),
    (nothing, ["train.precision=fp8"], 2, "not one of fp32, tf32, bf16", ["train.precision=fp32"]),
    (nothing, ["train.max_steps=ten"], 2, "not a whole number", ["train.max_steps=10"]),
    (nothing, ["train.max_steps=none"], 2, "null", ["train.max_steps=null"]),
    (nothing, ["eval.prompts=[none]"], 2, "null", ["eval.prompts=[]"]),
    (nothing, ["train.torch_compile=yes"], 2, "write true", ["train.torch_compile=true"]),
    (nothing, ["train.global_batch_size=9", "train.micro_batch_size=2"], 2,
     "train.global_batch_size=", ["train.global_batch_size=8", "train.micro_batch_size=2"]),
    (nothing, ["train.global_batch_size=4096"], 2, "less than train.global_batch_size=4096",
     ["train.global_batch_size=8"]),
    (nothing, ["checkpoint.save_total_limit=1"], 2, "2", ["checkpoint.save_total_limit=2"]),
    (nothing, ["run.name=my run"], 2, "not a plain name", ["run.name=my-run"]),
    (nothing, ["--run.name=b"], 2, "write run.name=b", ["run.name=b"]),
    (nothing, ["--nodes=2"], 2, "options for sbatch come after --", ["--", "--nodes=2"]),
    (nothing, ["--resume=nobody"], 1, "no run nobody in", []),
    (nothing, ["model.name=tiny/"], 2, "neither org/name on the Hub nor", ["model.name=tiny"]),
    (nothing, ["model.name=https://huggingface.co/tiny"], 2, "write tiny", ["model.name=tiny"]),
    (nothing, ["model.name=other/model"], 1, "run: bash download_data_model.sh model.na", []),
    (nothing, ["model.init=pretrained"], 1, "or set model.init=scratch", ["model.init=scratch"]),
    (nothing, ["data.name=./nowhere.jsonl"], 1, "no such file or folder; check its path", []),
    (nothing, ["data.name=$DATA"], 2, "write what it stands for", ["data.name=tiny"]),
    (nothing, ["data.text_field=body"], 1, "are not ready", []),
    (nothing, ["optim.lr_scheduler_type=cosine"], 2, "takes num_cycles, and not min_lr_rate",
     ["optim.lr_scheduler_type=cosine", "optim.lr_scheduler_kwargs={}"]),
    (nothing, ["optim.lr_scheduler_type=cosin"], 2, "cosine", ["run.name=c"]),
    (nothing, ["eval.patience=3", "eval.eval_steps=null"], 2, "the only evaluation is at the end",
     ["eval.patience=3"]),
    (nothing, ["run.branch_from=first@5"], 2, "choose another run.name", []),
    (nothing, ["run.branch_from=first", "run.name=b"], 2, "RUN@STEP", []),
    (nothing, ["run.branch_from=gone@5", "run.name=b"], 2, "run gone has no checkpoint 5", []),
    (nothing, ["my.yml"], 2, "no such file", []),
    (write(TINY + "train: {max_steps: 5\n"), ["my.yaml"], 2, "my.yaml:", []),
    (write(TINY + "train:\n\tmax_steps: 5\n"), ["my.yaml"], 2, "tab", []),
    (write(TINY + "train: {}\ntrain: {max_steps: 6}\n"), ["my.yaml"], 2, "repeated", []),
    (write(TINY + "trian: {max_steps: 5}\n"), ["my.yaml"], 2, "did you mean train?", []),
    (write(TINY + "train: 5\n"), ["my.yaml"], 2, "train", []),
    (write("- a\n- b\n"), ["my.yaml"], 2, "my.yaml", []),
    (write(""), ["my.yaml"], 2, "holds nothing instead of sections", []),
    (nothing, ["--config", "my.yaml", "other.yaml"], 2, "one file of settings at a time", []),
    (nothing, ["--", "--gpus-per-nodes=2"], 2, "sbatch", []),
    (nothing, ["--local", "--chain", "3"], 2, "leave out: --chain", ["--local"]),
    (nothing, ["--chain", "0"], 2, "write --chain 4", ["--chain", "4"]),
    (nothing, ["--", "--wrap=hostname"], 2, "leave out: --wrap=hostname", []),
    (nothing, ["run.seed=-1"], 2, "write a number at least 0", ["run.seed=1"]),
    (nothing, ["log.report_to=wandb"], 2, "write [wandb]", ["log.report_to=[tensorboard]"]),
]  # fmt: skip


def each(mistakes: list) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("prepare", "typed", "code", "what", "fix"), mistakes,
        ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
    )  # fmt: skip


@each(MISTAKES)
def test_a_mistake_is_one_line_with_a_fix_that_works(site, prepare, typed, code, what, fix):
    prepare(site)
    site.sbatch(
        "echo 4711",
        trial="""
        if [[ "$*" == *--gpus-per-nodes* ]]; then
          echo "sbatch: unrecognized option '--gpus-per-nodes=2'" >&2; exit 1
        fi""",
    )
    line = complaint(site.submit("--dry-run", *typed), code)
    assert what in line
    assert not re.search(r"Traceback|pydantic|\bNone\b|<class", line)
    assert not site.run_dir.exists()
    if fix:
        fixed = site.submit("--dry-run", *fix)
        assert fixed.returncode == 0, fixed.stderr


@each([*MISTAKES[15:16], *MISTAKES[-10::2]])
def test_the_monitor_tells_a_refusal_until_a_submission_is_accepted(
    site, prepare, typed, code, what, fix
):
    prepare(site)
    assert site.run("setup.sh", "--is-ready").returncode == 0  # env.sh, as after setup.sh
    refused = "sbatch: unrecognized option '--gpus-per-nodes=2'"
    trial = f'if [[ "$*" == *--gpus-per-nodes* ]]; then echo "{refused}" >&2; exit 1; fi'
    site.sbatch("echo 4711", trial)
    line = complaint(site.submit(*typed, HF_TOKEN=SECRET), code)
    run = "nobody" if "--resume=nobody" in typed else "first"
    told = site.run("monitor.sh", run, "--why")
    assert (told.returncode, told.stderr) == (1, "")
    said = " ".join(told.stdout.split())
    assert said.startswith(f"{run}: there is no such run") and "before the queue" in said
    assert " ".join(line.split())[:200] in said
    assert "ends in the same way; it lies with" in said
    if run == "first":
        assert site.submit().returncode == 0
        assert "refused" not in site.run("monitor.sh", run, "--why").stdout


def test_a_token_in_a_wrong_command_is_not_kept(site):
    assert site.run("setup.sh", "--is-ready").returncode == 0
    other = "--export=AWS_SECRET_ACCESS_KEY=aThingOfMine"
    for typed in (["--", f"--export=A={SECRET}"], [f"model.name={SECRET}", "lr=1"], ["--", other]):
        complaint(site.submit(*typed), 2)
    kept = [path.read_text() for path in (site.home / "cache" / "refused").iterdir()]
    assert kept and "aThingOfMine" not in "".join(kept)  # the site looks for SECRET
