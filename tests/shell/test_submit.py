"""submit.sh against fake Slurm commands: golden command lines, hostile paths, no secret told."""

import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_site import BASH, Site, complaint

import tiny
from trainstack.config.load import load
from trainstack.job.resources import read_resources
from trainstack.optim.schedule import odd_rate
from trainstack.run.folder import RunFolder
from trainstack.run.lease import Lease, Owner
from trainstack.run.owner import claim_of
from trainstack.storage import layout
from trainstack.storage.manifest import MANIFEST, read_manifest, write_manifest


def test_submit_prints_the_job_id_alone_and_says_the_rest_on_stderr(site):
    result = site.submit()
    assert result.returncode == 0, result.stderr
    assert result.stdout == "4711\n"
    lines = result.stderr.splitlines()
    assert all(line.startswith("submit.sh: ") for line in lines)
    assert "config.yaml ok | model tiny, tokens of tiny: verified | " in lines[1]
    assert lines[2].startswith("submit.sh: learning rate 1.00e-03 at step 1, 1.00e-02 at step 10")
    assert "1 node x 1 GPU, 24:00:00, partition (default) | code and config kept in" in lines[3]
    assert "run first is queued; look: bash monitor.sh first" in lines[4]
    run = RunFolder(site.run_dir)
    assert run.status()["state"] == "QUEUED"
    assert [(event["event"], event["job"]) for event in run.events()] == [("submitted", "4711")]


def test_if_the_type_of_gpu_is_known_a_line_tells_memory_and_time(site):
    told = []
    for _ in range(2):
        lines = site.submit("--dry-run", "--", "--gpus-per-node=h100:1").stderr.splitlines()
        told.append([line.removeprefix("submit.sh: plan: ") for line in lines if "plan: " in line])
    first, second = told
    assert first[0].startswith("finding out what a step of this model takes")
    assert first[1:] == second  # by then it is known
    assert re.fullmatch(
        r"about 1\.2 of 80 GB per GPU \(H100\), 0\.\d+ s a step, 0% MFU, \d s for 20 steps",
        second[0],
    )


def golden(site: Site, *sbatch_options: str) -> list[str]:
    """The arguments of sbatch but for --export, whose names come in any order."""
    return [
        "--parsable", "--job-name=first", f"--output={site.run_dir}/logs/%j.out",
        f"--chdir={site.run_dir}", *sbatch_options, f"{site.run_dir}/code/job.slurm",
        str(site.run_dir),
    ]  # fmt: skip


def without_export(call: list[str]) -> list[str]:
    return [word for word in call if not word.startswith("--export=")]


def exported(call: list[str]) -> set[str]:
    """The names of the variables that a job gets."""
    (names,) = [word.partition("=")[2] for word in call if word.startswith("--export=")]
    return set(names.split(","))


def test_sbatch_gets_exactly_these_arguments_also_where_paths_are_hostile(site):
    options = ["--nodes=4", "--gpus-per-node=1", "--comment=two words; $(touch canary)"]
    assert site.submit("--", *options).returncode == 0
    (call,) = site.submissions()
    assert without_export(call) == golden(site, *options)


def test_a_job_sees_the_names_on_the_list_and_never_a_secret(site):
    fault = "kill:rank=1,step=25;nan:step=30"
    result = site.submit(
        NCCL_DEBUG="INFO", OMP_PLACES="cores", EDITOR="vi", PYTHONPATH="/x", MASTER_PORT="29500",
        RANK="3", TMPDIR=str(site.folder), CONDA_PREFIX="/c", CUDA_VISIBLE_DEVICES="",
        SLURM_MEM_PER_CPU="64", SBATCH_PARTITION="debug", NPROC_PER_NODE="2",
        TRAINSTACK_FAULT=fault,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (call,) = site.submissions()
    assert exported(call) == {
        "HOME", "LANG", "MODULES", "PATH", "NPROC_PER_NODE", "TRAINSTACK_FAULT",
    }  # fmt: skip
    told = "not passed to the job: CUDA_VISIBLE_DEVICES, NCCL_DEBUG, OMP_PLACES, SBATCH_PARTITION;"
    assert told in result.stderr
    seen = site.commands.environment("sbatch")
    assert not {"SLURM_MEM_PER_CPU", "SBATCH_PARTITION"} & seen.keys()
    assert site.commands.environment("sbatch")["TRAINSTACK_FAULT"] == fault


def test_a_variable_that_train_slurm_takes_from_the_shell_reaches_the_job(site):
    script = site.checkout / "train.slurm"
    line = 'export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"\n'
    script.write_text(script.read_text().replace("# export NCCL_DEBUG", f"{line}# export NCCL_D"))
    result = site.submit(NCCL_DEBUG="INFO")
    assert result.returncode == 0, result.stderr
    (call,) = site.submissions()
    assert "NCCL_DEBUG" in exported(call)
    assert "not passed" not in result.stderr


def test_an_option_takes_the_place_of_the_lines_on_the_same_resource(site):
    """sbatch takes both: two GPUs in all, of which each node has one, are two nodes."""
    options = ["--gpus=2", "--cpus-per-gpu=3", "--mem-per-gpu", "2G"]
    result = site.submit("--", *options)
    assert result.returncode == 0, result.stderr
    lines = (site.run_dir / "code" / "job.slurm").read_text().splitlines()
    asked = [line for line in lines if line.startswith("#SBATCH")]
    kept = (site.checkout / "train.slurm").read_text().splitlines()
    dropped = ["#SBATCH --gpus-per-node=1", "#SBATCH --cpus-per-task=8"]
    assert asked == [line for line in kept if line.startswith("#SBATCH") and line not in dropped]
    assert "1 node x 2 GPUs" in result.stderr
    assert site.submit("--", "--time=5").returncode == 0
    assert (site.run_dir / "code" / "job.slurm").read_text().splitlines() == kept


def test_a_dry_run_prints_the_command_of_the_job_and_changes_nothing(site):
    site.run("setup.sh", "--is-ready")
    before = site.files()
    result = site.submit("--dry-run", "--", "--time=5")
    assert result.returncode == 0, result.stderr
    assert site.files() == before
    assert site.submissions() == []
    words = words_of(result.stdout)
    assert words[0] == "sbatch"
    assert without_export(words[1:]) == golden(site, "--time=5")


def words_of(line: str) -> list[str]:
    """What bash makes of a line that a person would paste."""
    parse = ["bash", "-c", f"printf '%s\\0' {line}"]
    return subprocess.run(parse, capture_output=True, text=True).stdout.split("\0")[:-1]


def test_a_dry_run_on_this_machine_prints_its_command_too(site):
    result = site.submit("--dry-run", "--local")
    assert result.returncode == 0, result.stderr
    assert "code/train.slurm" in result.stdout
    assert not site.run_dir.exists()


def golden_chain(site: Site, *sbatch_options: str) -> list[str]:
    """The arguments of each sbatch of a chain, but for --export."""
    digest = hashlib.sha256(f"{site.run_dir}\n".encode()).hexdigest()[:8]
    words = golden(site, *sbatch_options, "--no-requeue", "--dependency=singleton")
    return ["--parsable", f"--job-name=first-{digest}", *words[2:]]


NUMBERED = """n="$(cat ids 2>/dev/null || echo 4710)"; echo "$((n + 1))" >ids; cat ids"""


def test_a_chain_is_jobs_of_one_name_of_which_each_waits_for_the_one_before(site):
    site.sbatch(NUMBERED)
    result = site.submit("--chain", "3", "--", "--time=1:00:00")
    assert (result.returncode, result.stdout) == (0, "4711\n"), result.stderr
    calls = site.submissions()
    assert [without_export(call) for call in calls] == [golden_chain(site, "--time=1:00:00")] * 3
    assert all("TRAINSTACK_CHAIN" in exported(call) for call in calls)
    assert site.commands.environment("sbatch")["TRAINSTACK_CHAIN"] == "1"
    name = calls[0][1].partition("=")[2]
    last = result.stderr.splitlines()[-1]
    assert f"then follow, one after the other: 4712 4713; to end all: scancel --name={name}" in last
    events = [(event["event"], event["job"]) for event in RunFolder(site.run_dir).events()]
    assert events == [("submitted", "4711"), ("submitted", "4712"), ("submitted", "4713")]
    assert RunFolder(site.run_dir).status()["state"] == "QUEUED"


def test_the_chains_of_two_projects_with_one_run_name_do_not_wait_for_each_other(site):
    other = {"PROJECT_NAME": "other"}
    shutil.copytree(
        site.home, site.shared / "other", symlinks=True, ignore=shutil.ignore_patterns("runs")
    )
    for names in ({}, {}, other):
        result = site.submit("--chain=2", **names)
        assert result.returncode == 0, result.stderr
    names = [call[1] for call in site.submissions()]
    assert names[0] == names[1] == names[2] == names[3] != names[4] == names[5]
    assert all(re.fullmatch(r"--job-name=first-[0-9a-f]{8}", name) for name in names)


def test_without_chain_no_job_believes_that_others_wait_behind_it(site):
    assert site.submit(TRAINSTACK_CHAIN="1").returncode == 0
    (call,) = site.submissions()
    assert "TRAINSTACK_CHAIN" not in exported(call)


def test_a_dry_run_of_a_chain_prints_every_command_and_submits_nothing(site):
    result = site.submit("--dry-run", "--chain", "2", "--", "--time=5")
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == second
    assert words_of(first)[:2] == ["TRAINSTACK_CHAIN=1", "sbatch"]
    assert without_export(words_of(first)[2:]) == golden_chain(site, "--time=5")
    assert site.submissions() == []
    assert not site.run_dir.exists()


def test_a_second_submit_is_refused_while_any_job_of_a_chain_waits(site):
    site.sbatch(NUMBERED)
    assert site.submit("--chain", "3").returncode == 0
    for alive, named in (
        (
            "4711 RUNNING\\n4712 PENDING\\n4713 PENDING",
            "4711 (RUNNING), 4712 (PENDING), 4713 (PEND",
        ),
        ("4713 PENDING", "4713 (PENDING)"),
        ("4712 RUNNING", "4712 (RUNNING)"),
    ):
        site.queue("12 RUNNING", *alive.split("\\n"))
        for arguments in ([], ["--chain", "2"]):
            line = complaint(site.submit(*arguments), 78)
            assert f"run first has job {named}" in line
            assert line.endswith("scancel " + " ".join(re.findall(r"471\d", alive)))
    assert len(site.submissions()) == 3
    site.queue("12 RUNNING")
    assert site.submit().stdout == "4714\n"


def test_a_chain_that_sbatch_breaks_off_says_which_jobs_there_are(site):
    refusal = "echo 'sbatch: error: job submit limit' >&2; exit 3"
    site.sbatch(f"[[ ! -e ids || $(<ids) != 4712 ]] || {{ {refusal}; }}; {NUMBERED}")
    result = site.submit("--chain", "4")
    assert (result.returncode, result.stdout) == (3, "4711\n")
    last = result.stderr.splitlines()[-1]
    assert "error: sbatch refused job 3 of 4: sbatch: error: job submit limit" in last
    assert "; in the queue are already 4711 4712; to end them: scancel --name=first-" in last
    run = RunFolder(site.run_dir)
    events = [(event["event"], event.get("job")) for event in run.events()]
    assert events == [("submitted", "4711"), ("submitted", "4712"), ("not_submitted", None)]
    assert run.status()["state"] == "QUEUED"


def test_a_chain_that_sbatch_refuses_at_once_leaves_nothing_behind(site):
    site.sbatch("exit 3")
    result = site.submit("--chain", "4")
    assert (result.returncode, result.stdout) == (3, "")
    assert "sbatch refused job 1 of 4" in result.stderr
    assert "in the queue" not in result.stderr
    assert RunFolder(site.run_dir).status()["state"] == "NOT_SUBMITTED"


def test_the_cluster_that_sbatch_names_is_no_part_of_the_job_id(site):
    site.sbatch("echo 'Jobs before 2019:'; echo '4711;east'; echo 'Bye'")
    assert site.submit().stdout == "4711\n"
    assert [event["job"] for event in RunFolder(site.run_dir).events()] == ["4711"]


REFUSALS = {
    "Batch job submission failed: Invalid partition name specified": "sinfo -s lists the",
    "Invalid account or account/partition combination specified": "#SBATCH --account=NAME",
    "Requested time limit is invalid (missing or exceeds some limit)": "#SBATCH --time",
    "Requested node configuration is not available": "fewer nodes, GPUs or cores",
    "Invalid generic resource (gres) specification": "no such GPUs here",
    "--mem, --mem-per-cpu, and --mem-per-gpu are mutually exclusive.": "leave out all but one",
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_a_refusal_of_sbatch_gets_a_hint(site, reason):
    script = ["-c", 'source "$1"; hint "$2"', "bash", site.checkout / "submit.sh", reason]
    result = subprocess.run(
        [BASH, *script], capture_output=True, text=True, env=site.environment, cwd=site.cwd
    )  # without USER, as in many containers
    assert result.stderr == ""
    assert REFUSALS[reason] in result.stdout


def test_what_sbatch_refuses_is_one_line_with_its_reason_and_a_hint(site):
    reason = "sbatch: error: invalid partition specified: x\\nsbatch: error: and more"
    site.sbatch(f"printf '{reason}\\n' >&2; exit 3")
    result = site.submit()
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.count("error: sbatch refused") == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("submit.sh: error: sbatch refused the job: sbatch: error: invalid part")
    assert "and more" in last
    assert "(sinfo -s lists the partitions; put yours into train.slurm)" in last


def test_a_refused_job_leaves_the_status_of_before(site):
    site.sbatch("echo 'sbatch: error: no room' >&2; exit 3")
    assert site.submit().returncode == 3
    status = RunFolder(site.run_dir).status()
    assert (status["state"], status["cause"]) == ("NOT_SUBMITTED", "sbatch: error: no room")
    RunFolder(site.run_dir).set_status("PAUSED", step=7, job="12")
    before = (site.run_dir / "status.json").read_text()
    assert site.submit().returncode == 3
    assert json.loads((site.run_dir / "status.json").read_text()) == json.loads(before)
    assert {e["event"] for e in RunFolder(site.run_dir).events()} == {"not_submitted"}


def test_without_sbatch_the_way_out_is_named(site):
    site.commands.remove("sbatch")
    assert "no sbatch here; log in to the cluster, or use --local" in complaint(site.submit(), 1)


def test_a_slurm_that_does_not_answer_is_quoted_on_one_line(site):
    site.commands.add("squeue", "printf 'slurm_load_jobs error: no contact\\nmore\\n' >&2; exit 1")
    line = complaint(site.submit(), 1)
    assert "Slurm does not answer: slurm_load_jobs error: no contact more; try again" in line
    assert site.submissions() == []


def test_a_queue_of_twenty_thousand_jobs_is_no_obstacle(site):
    """One argument of a command may have 128 KiB on Linux; this queue has 300."""
    loop = "for ((i = 100000; i < 120000; i++)); do"
    site.commands.add("squeue", f'{loop} echo "job|$i|PENDING|1:00|None|"; done')
    result = site.submit()
    assert result.stdout == "4711\n", result.stderr


def test_an_environment_that_is_not_ready_is_named_with_the_command_that_makes_it(site):
    (site.home / "venv" / ".pins").unlink()
    assert "not ready; run: bash setup.sh" in complaint(site.submit(), 1)
    assert "not ready; run: bash setup.sh" in complaint(site.submit("--local", "--dry-run"), 1)


def test_a_folder_that_is_not_there_is_not_set_up_beside_the_one_that_is(site, tmp_path):
    site.submit("--dry-run")  # env.sh is written by the first that finds the environment
    result = site.submit("--local", SHARED_DIR=str(tmp_path / "wrong"))
    line = complaint(result, 1)
    assert f"{tmp_path}/wrong/trainstack is not there; correct SHARED_DIR, PROJECT_NAME" in line
    assert not (tmp_path / "wrong").exists()


WRONG_USE = [
    (["--train.max_steps=4"], "is a setting, not an option; write train.max_steps=4"),
    (
        ["--nodes=4"],
        "--nodes=4 is not an option (see --help); a setting is key=value",
    ),
    (["--config"], "--config needs a file"),
    (["--", "train.max_steps=5"], "train.max_steps=5 is a setting; write it before the --"),
    (["--", "--dry-run"], "--dry-run is an option of submit.sh, not of sbatch; write it before"),
    (["--", "--wrap=ls"], "by train.slurm; leave out: --wrap=ls"),
    (["--local", "--", "--nodes=2", "-t 5"], "leave out: --nodes=2 -t 5"),
    (["--chain"], "--chain needs a number of jobs, such as --chain 4"),
    (["--chain="], "--chain  is not a number of jobs from 2 to 999; write --chain 4"),
    (["--chain", "1"], "--chain 1 is not a number of jobs from 2 to 999; write --chain 4"),
    (["--chain=two"], "--chain two is not a number of jobs"),
    (["--chain", "1000"], "--chain 1000 is not a number of jobs"),
    (["--chain", "--dry-run"], "--chain --dry-run is not a number of jobs"),
    (["--chain", "3", "--local"], "--local has no time limit and needs no chain"),
    (["--chain", "3", "--", "--nodes=2", "--requeue"], "leave out: --requeue"),
    (["--chain", "3", "--", "-J", "mine"], "leave out: -J"),
    (["--chain", "3", "--", "--dependency=afterok:5"], "leave out: --dependency=afterok:5"),
    (["nonsense"], "nonsense is not a setting; write section.key=value"),
    (["run.name=$(touch canary)"], "not a plain name"),
    (["run.name=../../up"], "not a plain name"),
    (["--config", "nowhere.yaml"], "nowhere.yaml: no such file; check its path"),
    (["train.global_batch_size=9", "train.micro_batch_size=3", "--", "-N2"], "no multiple of"),
    (["--", "--nodes=3", "--gpus-per-node=h100:8"], "x 24 processes; write train.global_batch"),
    (["--", "--nodes=0"], "0 processes cannot train"),
    (["--", "--time=3"], "--time=3 is too short: --signal asks for a warning 180 s before the"),
    (["--", "--gpus=3", "-N2"], "--gpus=3 cannot be the same on each of 2 nodes"),
    (["--", "-o", "x.log"], "logs lie in the folder of the run, where monitor.sh looks; leave out"),
    (
        ["--", "--array=1-3"],
        "one job at a time works on a run, by train.slurm; leave out: --array=1-3",
    ),
    (["--", "--export=ALL"], "train.slurm holds what a job is to have; leave out: --export=ALL"),
    (["--", "other.sh"], "other.sh is no option of sbatch, and the job is train.slurm"),
    (["--", "--hold", "other.sh"], "other.sh is no option of sbatch"),
    (
        ["--", "--nodes=two"],
        "--nodes=two is no value that Slurm reads; write for example --nodes=2",
    ),
    (["--", "--nodes=3-1"], "--nodes=3-1: the least comes first; write 1-3"),
    (["--", "--gpus-per-node="], "--gpus-per-node= is no value that Slurm reads"),
    (["--", "--gpus-per-node=-1"], "--gpus-per-node=-1 is no value that Slurm reads"),
    (["--", "--time=-5"], "--time=-5 is no value that Slurm reads"),
    (["--", "--gpus-per-socket=1"], "--gpus-per-socket is not passed on to srun; write"),
    (["--", "--signal=USR2@60"], "--signal=USR2@60 does not reach what saves the run"),
    (["train.global_batch_size=9", "train.micro_batch_size=3", "--", "-N1-2"], "no multiple of"),
    (["--", "--test-only"], "--dry-run, before the --, makes all checks; leave out: --test-only"),
]


@pytest.mark.parametrize(("arguments", "fix"), WRONG_USE, ids=lambda value: " ".join(value)[:40])
def test_a_wrong_use_is_one_line_before_the_queue(site, arguments, fix):
    assert fix in complaint(site.submit(*arguments), 2)
    assert site.submissions() == []
    assert not site.run_dir.exists()


SPELLINGS = [
    # options -> nodes, and GPUs, CPUs, MB on each
    ("", 1, 0, 1, None),
    ("--nodes=3", 3, 0, 1, None),
    ("--nodes 3", 3, 0, 1, None),
    ("-N3", 3, 0, 1, None),
    ("-N 3 --nodes=4 -c8", 4, 0, 8, None),
    ("--nodes=2-4", None, None, None, None),
    ("--gpus-per-node=3 --mem=0", 1, 3, 1, 0),
    ("--gpus-per-node a100:3 --cpus-per-gpu=4 --mem-per-gpu=2G", 1, 3, 12, 6144),
    ("--gres=gpu:3 -c 6", 1, 3, 6, None),
    ("--gres=gpu", 1, 1, 1, None),
    ("--gres=lscratch:100,gpu:a100:3 --mem=1.5G", 1, 3, 1, None),
    ("--gres=lscratch:100", 1, 0, 1, None),
    ("--gpus-per-node=2080ti:1 --signal=B:SIGUSR1@200", 1, 1, 1, None),
    ("--gpus-per-node=1g.5gb:2 -n 2", 1, 2, 2, None),
    ("--gpus-per-node=h100 --mem=1G", 1, None, 1, 1024),
    ("--gpus=8", 1, 8, 1, None),
    ("-N2 -G h100:8 --cpus-per-gpu=2", 2, 4, 8, None),
    ("-N2 -n16 --gpus-per-task=1 --cpus-per-task=4 --mem-per-cpu=500M", 2, 8, 32, 16000),
    ("--ntasks-per-node=4 --cpus-per-task=2 --mem=64GB", 1, 0, 8, 65536),
]


@pytest.mark.parametrize(("options", "nodes", "gpus", "cpus", "megabytes"), SPELLINGS)
def test_what_the_job_asks_for_is_read_in_every_spelling_of_sbatch(
    tmp_path, options, nodes, gpus, cpus, megabytes
):
    script = tmp_path / "train.slurm"
    script.write_text('#SBATCH --time=24:00:00\nNPROC_PER_NODE="${NPROC_PER_NODE:-}"\n')
    for words in ((options.split(), ""), ([], f"#SBATCH {options} # because\n")):
        script.write_text(script.read_text() + words[1])
        found = read_resources(script, words[0])
        asked = found.nodes, found.gpus_per_node, found.cpus_per_node, found.megabytes_per_node
        assert asked == (nodes, gpus, cpus, megabytes)
        assert (found.time, found.processes_per_node) == ("24:00:00", 0)


CLUSTER = """\
node|gpu|gpu*|2|4|8000|gpu:h100:2(S:0-1)|2-00:00:00|1-infinite|up|idle
node|gpu|gpu*|1|16|64000|gpu:a100:4|2-00:00:00|1-infinite|up|mix
node|debug|debug|3|4|8000|(null)|1:00:00|1-2|up|idle
"""
NEVER = [
    # options -> what the line says, which of them helps, written so
    ("-c32", "=32 is 32 CPUs per node, but no node of partition gpu has more than 16",
     "--cpus-per-task=16"),
    ("-c8 --ntasks-per-node=4", "--cpus-per-task=8 is 32 CPUs per node", "--cpus-per-task=4"),
    ("-p debug -c8 -t 9 --gpus-per-node=0", "no node of partition debug has more than 4",
     "--cpus-per-task=4"),
    ("--mem=128G", "--mem=128G is 131,072 MB of memory per node", "--mem=64000M"),
    ("--cpus-per-gpu=8 --gpus-per-node=4", "--cpus-per-gpu=8 is 32 CPUs", "--cpus-per-gpu=4"),
    ("--mem-per-cpu=16G -c8", "--mem-per-cpu=16G is 131,072 MB", "--mem-per-cpu=8000M"),
    ("--gpus-per-node=8", "--gpus-per-node=8 is 8 GPUs per node", "--gpus-per-node=4"),
    ("--gres=gpu:h100:4", "--gres=gpu:h100:4 is 4 GPUs of type h100 per node", "--gres=gpu:h100:2"),
    ("--gpus-per-node=v100:1", "is 1 GPU of type v100 per node, but", "name a type that is there"),
    ("-p debug -c4 -t 9", "=1 is 1 GPU per node, but no node of partition debug has more than 0",
     "--gpus-per-node=0"),
    ("-N4 -c4", "--nodes=4, but partition gpu has 3 with all that the job asks for", "--nodes=3"),
    ("-N2 -c16", "--nodes=2, but partition gpu has 1 with all", "--nodes=1"),
    ("-c16 --gres=gpu:h100:2", "partition gpu has 0 with all", "ask for less on each node"),
    ("-t 3-0", "--time=3-0 is more than partition gpu allows, 2-00:00:00", "--time=2-00:00:00"),
    ("-p debug --gpus-per-node=0 -c4 -t 30 -N3", "=3 is more than partition debug gives to one job",
     "--nodes=2"),
    ("-p debug --gpus-per-node=0 -c4 -t 61", "--time=61 is more than partition debug allows",
     "--time=1:00:00"),
]  # fmt: skip


def know_cluster(site, is_accepted: bool = True) -> None:
    no = "allocation failure: Requested node configuration is not available"
    site.sbatch("echo 4711", trial="" if is_accepted else f"echo '{no}' >&2; exit 1")
    site.commands.add("sinfo", f"cat <<'EOF'\nWelcome\n{CLUSTER}\nEOF")


@pytest.mark.parametrize(("options", "what", "fix"), NEVER)
def test_a_job_that_can_never_start_is_refused_with_the_option_to_change(site, options, what, fix):
    know_cluster(site, is_accepted="time" in fix or "=3 is more than" in what)
    batch = ("train.global_batch_size=48", "train.micro_batch_size=1")
    line = complaint(site.submit(*batch, "--", *options.split()), 2)
    assert what in line and fix in line
    assert site.submissions() == []
    assert not site.run_dir.exists()


@pytest.mark.parametrize(
    "options",
    [
        "", "-c16", "--mem=0", "-N3 -c4", "--gpus=4", "--gres=gpu:a100:4", "-t 2-0",
        "-p debug,gpu -t 2-0", "-p nobody-told-of -c 999", "-p debug --gpus-per-node=0 -c4 -t 30",
        "--gpus-per-task=1 --ntasks-per-node=4 --cpus-per-task=4",
    ],
)  # fmt: skip
def test_a_job_that_some_partition_of_it_can_start_is_accepted(site, options):
    know_cluster(site)
    batch = ("train.global_batch_size=48", "train.micro_batch_size=1")
    result = site.submit(*batch, "--", *options.split())
    assert result.stdout == "4711\n", result.stderr


def test_what_a_qos_may_lift_is_told_and_not_refused(site):
    know_cluster(site)
    result = site.submit("--", "--time=3-0", "--qos=long")
    assert result.stdout == "4711\n", result.stderr
    assert "--time=3-0 is more than partition gpu allows, 2-00:00:00; the QOS would have to" in (
        result.stderr
    )


def test_what_sbatch_would_refuse_is_known_before_anything_is_written(site):
    site.sbatch("echo 4711", trial="echo 'sbatch: error: Invalid account or x' >&2; exit 1")
    line = complaint(site.submit(), 2)
    assert "sbatch refuses the job: sbatch: error: Invalid account or x" in line
    assert "#SBATCH --account=NAME" in line
    assert not site.run_dir.exists()


def test_nodes_that_are_only_down_and_a_late_start_are_told(site):
    text = "allocation failure: Required node not available (down, drained or reserved)"
    site.sbatch("echo 4711", trial=f"echo '{text}' >&2; exit 1")
    result = site.submit()
    assert result.stdout == "4711\n"
    assert f"Slurm, asked when the job could start: {text}" in result.stderr
    for days, told in ((3, "within 3 d\n"), (9000, "")):
        when = datetime.datetime.now() + datetime.timedelta(days=days, minutes=9)
        start = f"sbatch: Job 3 to start at {when:%Y-%m-%dT%H:%M:%S} using 4 processors on bar1"
        site.sbatch("echo 4711", trial=f"echo '{start}' >&2")
        said = site.submit().stderr
        assert ("Slurm expects to start the job" in said) is bool(told)
        assert told in said


NO_NODES = "allocation failure: Requested node configuration is not available"


@pytest.mark.parametrize(
    ("state", "options", "told"),
    [
        ("idle", ["--exclude=gpu-[1-9]"], "no nodes of partition gpu are as the job asks; look at"),
        ("drain", [], "; perhaps since some are down, drained or reserved now (sinfo -R)"),
        ("idle", ["--nodes=2", "--nodelist=gpu-1"], f"asked when the job could start: {NO_NODES}"),
    ],
)
def test_where_slurm_finds_no_nodes_it_depends_on_whether_all_are_there(site, state, options, told):
    site.commands.add("sinfo", f"echo 'node|gpu|gpu*|3|64|256000|gpu:2|2-00:00:00|1-10|up|{state}'")
    site.sbatch("echo 4711", trial=f"echo '{NO_NODES}' >&2; exit 1")
    result = site.submit("--", *options)
    assert told in result.stderr
    is_refused = state == "idle" and not any("nodelist" in option for option in options)
    assert result.returncode == (2 if is_refused else 0)
    assert site.submissions() == [] if is_refused else site.submissions()


def test_a_blank_beside_an_equals_sign_in_train_slurm_is_found_before_the_queue(site):
    script = site.checkout / "train.slurm"
    script.write_text(f"{script.read_text()}\nNPROC_PER_NODE = 2\n")
    line = complaint(site.submit(), 2)
    assert "bash takes no blank beside =; correct NPROC_PER_NODE = 2" in line


def test_a_second_submit_while_the_first_one_starts_changes_nothing(site):
    """Nobody has the lease yet: the job begins seconds later."""
    fake_torchrun(site)
    body = site.python.read_text()
    site.python.write_text(body.replace("  exit 0\n", "  sleep 4; exit 0\n"))
    first = subprocess.Popen(
        [BASH, site.checkout / "submit.sh", "--local"], cwd=site.cwd, env=site.environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    config = site.run_dir / "config.yaml"
    while not (site.run_dir / "status.json").exists():
        time.sleep(0.05)
    before = config.read_bytes()
    told = f"run first is in the hands of process {first.pid} on {os.uname().nodename}, which has"
    for options in ([], ["--local"]):
        second = site.submit(*options, "run.seed=9")
        assert (second.returncode, second.stdout) == (78, "")
        assert told in second.stderr.splitlines()[-1]
    assert config.read_bytes() == before
    assert first.wait() == 0, first.stdout.read()
    assert site.submit("run.seed=9").returncode == 0, "its process has ended"


def test_a_submit_on_another_host_is_believed_for_two_minutes(site):
    claim = claim_of(RunFolder(site.run_dir))
    claim.parent.mkdir(parents=True, exist_ok=True)
    claim.write_text('{"host": "login2", "pid": 1, "process_started": "x"}')
    result = site.submit()
    assert result.returncode == 78 and site.submissions() == []
    assert "in the hands of process 1 on login2, which has just begun" in result.stderr
    os.utime(claim, (time.time() - 130, time.time() - 130))
    assert site.submit().returncode == 0
    assert not claim.exists(), "the job itself tells"


def test_a_job_that_was_submitted_after_slurm_was_asked_counts(site):
    """As by another submit.sh at the same moment, which has ended meanwhile."""
    run = RunFolder(site.run_dir)
    run.create()
    event = '{"event": "submitted", "job": "77", "at": "2999-01-01T00:00:00.000Z"}'
    (run.path / "events.jsonl").write_text(f"{event}\n")
    result = site.submit()
    assert result.returncode == 78 and site.submissions() == []
    assert "run first has job 77, just submitted; wait for it" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "script", ["submit.sh", "monitor.sh", "setup.sh", "download_data_model.sh"]
)
def test_help_that_nobody_reads_does_nothing_else(site, script):
    reader, writer = os.pipe()
    os.close(reader)
    before = site.files()
    result = subprocess.run(
        [BASH, site.checkout / script, "--help", *["--local"] * (script == "submit.sh")],
        stdout=writer, stderr=subprocess.PIPE, text=True, cwd=site.cwd, env=site.environment,
    )  # fmt: skip
    os.close(writer)
    assert result.returncode == 0 and "error" not in result.stderr
    assert site.files() == before


def test_a_slurm_that_is_silent_costs_seconds_and_one_line(site):
    site.commands.add("squeue", "sleep 60")
    line = complaint(site.submit(ANSWER_SECONDS="1"), 1)
    assert "Slurm does not answer: squeue gave no answer in 1 s; try again when" in line


def test_a_local_run_asks_slurm_only_of_runs_that_had_a_job(site):
    fake_torchrun(site)
    site.commands.add("squeue", "echo no contact; exit 1")
    assert "Slurm" not in site.submit("--local").stderr
    RunFolder(site.run_dir).add_event("submitted", job="1")
    told = "Slurm does not answer: no contact; that none of its jobs works on the run is not sure"
    assert told in site.submit("--local").stderr


def test_the_run_of_a_colleague_whose_job_slurm_hides_is_left_alone(site):
    run = RunFolder(site.run_dir)
    run.create()
    holder = {"job": "55", "attempt": 1, "host": "gpu-07", "pid": 1, "process_started": "x"}
    (site.run_dir / "lease" / "1.json").write_text(json.dumps({**holder, "user": "somebody"}))
    run.beat("55")
    line = complaint(site.submit(), 78)
    assert "is in the hands of job 55 of somebody, whose heartbeat is " in line
    os.utime(run.logs / "55.alive", (0, 0))
    assert site.submit().stdout == "4711\n"


def test_several_mistakes_are_told_together_under_one_head(site):
    result = site.submit("train.micro_batchsize=8", "optim.learning_rate=2e-5x")
    assert result.returncode == 2
    head, *problems = result.stderr.splitlines()
    assert head == "submit.sh: error: 2 problems in the configuration, nothing was submitted"
    assert len(problems) == 2


def test_a_number_of_processes_that_is_none_is_refused(site):
    line = complaint(site.submit(NPROC_PER_NODE="two"), 2)
    assert "NPROC_PER_NODE=two is not a number of processes" in line


def test_the_processes_that_train_slurm_was_edited_for_count_in_the_arithmetic(site):
    script = site.checkout / "train.slurm"
    edited = script.read_text().replace('"${NPROC_PER_NODE:-}"', '"${NPROC_PER_NODE:-3}"')
    script.write_text(edited)
    assert "micro_batch_size=2 x 3 processes" in complaint(site.submit(), 2)
    assert site.submit(NPROC_PER_NODE="2").returncode == 0


def test_a_config_file_is_found_from_the_folder_of_the_user(site):
    shutil.copy(site.checkout / "config.yaml", site.cwd / "my own.yaml")
    result = site.submit("--config", "my own.yaml", "run.name=other")
    assert result.stdout == "4711\n", result.stderr
    assert "my own.yaml ok" in result.stderr
    assert (site.shared / "trainstack" / "runs" / "other" / "config.yaml").exists()


def test_a_second_submit_is_refused_while_the_job_of_the_first_waits(site):
    assert site.submit().returncode == 0
    site.queue("12 RUNNING", "4711 PENDING")
    line = complaint(site.submit(), 78)
    assert "run first has job 4711 (PENDING) already; wait for it, or end it: scancel 4711" in line
    assert len(site.submissions()) == 1


def test_a_run_in_the_hands_of_a_live_job_is_refused_and_of_a_dead_one_continued(site):
    RunFolder(site.run_dir).create()
    holder = {"job": "55", "attempt": 1, "host": "gpu-07", "pid": 1, "process_started": "x"}
    (site.run_dir / "lease" / "1.json").write_text(json.dumps(holder))
    site.queue("55 RUNNING")
    assert "in the hands of job 55; wait for it" in complaint(site.submit(), 78)
    site.queue("56 RUNNING")
    assert site.submit().stdout == "4711\n"


def test_a_run_is_resumed_by_its_name_with_its_settings_and_options(site):
    options = ["--time=5", "--comment=two words"]
    site.submit("optim.learning_rate=0.5", "train.max_steps=30", "--", *options)
    site.make_checkpoint(5)
    RunFolder(site.run_dir).set_status("PAUSED", step=5)
    (site.checkout / "config.yaml").write_text("run: {name: another}\n")
    result = site.submit("--resume", "first")
    assert result.stdout == "4711\n", result.stderr
    assert "with the options of before: --time=5 --comment=two words" in result.stderr
    assert without_export(site.submissions()[-1]) == golden(site, *options)
    kept = load(site.run_dir / "config.yaml", [])
    assert (kept.optim.learning_rate, kept.train.max_steps) == (0.5, 30)
    result = site.submit("--resume=first", "optim.weight_decay=0.2", "--", "--time=6")
    assert "continues with other settings: train.max_steps: 20 -> 30, optim" in result.stderr
    assert without_export(site.submissions()[-1]) == golden(site, "--time=6")
    other = site.submit("--resume", "first", "model.name=org/other")  # which is not here
    assert other.returncode == 78, other.stderr
    assert "run first cannot continue with model.name=org/other (the run has" in other.stderr
    refused = site.submit("--resume", "first", "run.seed=7")
    assert refused.returncode == 78
    assert "run first cannot continue with run.seed=7 (the run has 1234)" in refused.stderr


def test_a_run_is_resumed_by_its_own_copy_of_the_code_without_any_checkout(site):
    assert site.submit().returncode == 0
    site.make_checkpoint(5)
    shutil.rmtree(site.checkout)
    own = [BASH, site.run_dir / "code" / "submit.sh", "--resume", "first"]
    result = subprocess.run(own, capture_output=True, text=True, cwd="/", env=site.environment)
    assert result.stdout == "4711\n", result.stderr
    assert (site.run_dir / "code" / "submit.sh").exists()


def test_the_settings_of_an_earlier_version_with_keys_missing_are_resumed(site):
    assert site.submit().returncode == 0
    path = site.run_dir / "config.yaml"
    kept = [line for line in path.read_text().splitlines() if "on_divergence" not in line]
    path.write_text("\n".join(kept) + "\n")
    assert site.submit("--resume", "first").stdout == "4711\n"
    assert "on_divergence: stop" in path.read_text()


RESUMES = [
    (["--resume", "second"], 1, "no run second in "),
    (["--resume"], 2, "--resume needs the name of a run; bash monitor.sh lists them"),
    (["--resume", "../x"], 2, "--resume ../x is not the name of a run"),
    (
        ["--resume", "first", "run.name=b"],
        2,
        "continues that run; for another one: bash submit.sh FILE run.name=b",
    ),
    (["--resume", "first", "my.yaml"], 2, "takes the settings of the run; leave out my.yaml"),
    (["a.yaml", "--config", "b.yaml"], 2, "one file of settings at a time, got a.yaml and b.yaml"),
]


@pytest.mark.parametrize(("arguments", "code", "what"), RESUMES)
def test_what_cannot_be_resumed_is_named(site, arguments, code, what):
    site.submit()
    assert what in complaint(site.submit(*arguments), code)


def test_a_run_that_has_lost_its_checkpoints_never_starts_over_unsaid(site):
    RunFolder(site.run_dir).create()
    RunFolder(site.run_dir).add_event("checkpoint", step=15)
    line = complaint(site.submit(), 1)
    assert "run first has lost its checkpoints, the last of step 15: restore one into" in line


def test_a_file_of_settings_may_stand_without_its_option(site):
    text = "run: {name: small}\noptim: {learning_rate: 0.5}\n"
    (site.cwd / "my own.yaml").write_text(text)
    result = site.submit("my own.yaml", "model.name=tiny", "data.name=tiny")
    assert "my own.yaml ok" in result.stderr, result.stderr


@pytest.mark.parametrize("what", ["model", "data", "both"])
def test_a_run_with_a_checkpoint_needs_nothing_of_its_start(site, what):
    assert site.submit().returncode == 0
    site.make_checkpoint(10)
    model, data = site.home / "models" / "tiny", site.home / "datasets" / "tiny"
    shutil.copy(model / "config.json", site.run_dir / "checkpoints/checkpoint-10/config.json")
    gone = {"model": [model], "data": [data], "both": [model, data]}[what]
    for path in gone:
        shutil.rmtree(path)
    result = site.submit("--resume", "first")
    assert result.stdout == "4711\n", result.stderr
    told = [line for line in result.stderr.splitlines() if "; not needed: the run has" in line]
    assert len(told) == len(gone)


def test_a_run_that_lives_on_this_machine_is_left_alone(site):
    assert site.submit().returncode == 0
    before = (site.run_dir / "config.yaml").read_text()
    Lease(site.run_dir).take(Owner("local-this-test", 1))
    for arguments in ([], ["--local"]):
        line = complaint(site.submit("train.max_steps=99", *arguments), 78)
        assert "is in the hands of job local-this-test" in line
    assert (site.run_dir / "config.yaml").read_text() == before


def test_a_run_whose_local_job_was_killed_a_moment_ago_is_continued(site):
    run = RunFolder(site.run_dir)
    run.create()
    host = os.uname().nodename
    holder = {"job": f"local-{host}-1-2", "attempt": 1, "host": host, "pid": 2**22 + 1}
    (site.run_dir / "lease" / "1.json").write_text(json.dumps({**holder, "process_started": "x"}))
    run.beat(holder["job"])
    assert site.submit("--dry-run", "--local").returncode == 0


def test_a_local_run_is_refused_while_a_job_of_slurm_works_on_it(site):
    assert site.submit().returncode == 0
    site.queue("4711 RUNNING")
    assert "run first has job 4711 (RUNNING) already" in complaint(site.submit("--local"), 78)


def test_settings_of_another_experiment_are_refused_with_the_difference(site):
    site.make_checkpoint(5, run__seed=99)
    line = complaint(site.submit(), 78)
    assert "run first cannot continue with run.seed=1234 (the run has 99); put it back, or" in line


def test_a_switch_that_differs_is_told_as_the_file_writes_it(site):
    site.make_checkpoint(5, data__each_turn=True)
    told = "cannot continue with data.each_turn=false (the run has true)"
    assert told in complaint(site.submit(), 78)


@pytest.mark.parametrize(
    ("init", "rate", "is_told"),
    [("pretrained", "4e-3", True), ("pretrained", "1e-3", False), ("scratch", "4e-3", False)],
)
def test_a_rate_for_new_weights_is_told_where_pretrained_ones_are_trained(init, rate, is_told):
    settings = [f"model.init={init}", f"optim.learning_rate={rate}"]
    told = odd_rate(load(tiny.ROOT / "config.yaml", settings))
    assert [line[:50] for line in told] == [
        "optim.learning_rate=0.004 is a rate for new weight"
    ] * is_told


def test_a_setting_that_may_change_continues_the_run(site):
    site.make_checkpoint(5)
    assert "other settings" not in site.submit("--dry-run").stderr
    changes = ("optim.learning_rate=0.5", "optim.weight_decay=0.2", "train.max_steps=30")
    told = (
        "submit.sh: run first continues with other settings: train.max_steps: 20 -> 30, "
        "optim.learning_rate: 0.01 -> 0.5, optim.weight_decay: 0.1 -> 0.2\n"
    )
    assert told in site.submit("--dry-run", *changes).stderr
    result = site.submit(*changes)
    assert result.stdout == "4711\n" and told in result.stderr
    kept = load(site.run_dir / "config.yaml", [])
    assert kept.optim.learning_rate == 0.5


def test_a_model_that_was_brought_again_is_told_to_change_nothing_in_a_run(site):
    site.make_checkpoint(10)
    RunFolder(site.run_dir).add_event("submitted", job="1")
    assert "brought again" not in site.submit("--dry-run").stderr
    folder = layout.model_folder(site.home, "tiny")
    facts = read_manifest(folder) | {"fetched_at": "2999-01-01T00:00:00+00:00"}
    (folder / MANIFEST).unlink()
    write_manifest(folder, facts.pop("files"), **facts)
    told = "other settings: model.name was brought again since, which changes nothing in this run"
    assert told in site.submit("--dry-run").stderr


def test_a_run_that_has_begun_needs_its_tokens_and_not_the_data_they_were_made_from(site):
    data = next((site.home / "datasets").rglob("*.jsonl"))
    data.write_text(data.read_text() + '{"text": "one more"}\n')
    assert "data set tiny is damaged" in complaint(site.submit("--dry-run"), 1)
    site.make_checkpoint(10)
    assert site.submit().stdout == "4711\n"


def test_a_complete_run_says_so_and_submits_nothing(site):
    site.make_checkpoint(20)
    RunFolder(site.run_dir).set_status("DONE", step=20)
    result = site.submit()
    assert (result.returncode, result.stdout) == (0, "")
    assert "run first is complete: 20 steps" in result.stderr
    assert "raise train.max_steps" in result.stderr
    fewer = site.submit("train.max_steps=null", "train.num_train_epochs=0.01").stderr
    assert "train.num_train_epochs asks for fewer steps, 1; for a new run" in fewer
    assert site.submissions() == []
    assert site.submit("train.max_steps=30").stdout == "4711\n"


def test_a_run_that_stopped_early_is_complete_until_it_gets_more_patience(site):
    site.make_checkpoint(10)
    run = RunFolder(site.run_dir)
    run.set_status("DONE", step=10)
    run.add_event("early_stop", step=10, best_step=4, evaluations=3, cause="why")
    asked = ["eval.eval_steps=2", "eval.patience=3"]
    result = site.submit(*asked)
    assert (result.returncode, result.stdout) == (0, "")
    assert "run first is complete: 10 steps" in result.stderr
    assert "it stopped early: why; to go further raise eval.patience, or set it" in result.stderr
    assert site.submit("eval.eval_steps=2", "eval.patience=4").stdout == "4711\n"
    assert site.submit("eval.patience=null").stdout == "4711\n"


def test_a_dry_run_of_a_branch_makes_nothing_and_the_submission_makes_it(site):
    site.make_checkpoint(10)
    asked = ["run.name=b", "run.branch_from=first@10", "optim.learning_rate=0.002"]
    logs = site.run_dir / "metrics.jsonl"
    logs.write_text(logged(10, 1e-2))
    told = site.submit("--dry-run", *asked)
    assert told.returncode == 0, told.stderr
    assert "run b begins as step 10 of run first" in told.stderr
    assert "jumps: by these settings it is 0.002 at step 10, which" in told.stderr
    assert not site.run_dir.with_name("b").exists()
    assert site.submit(*asked).stdout == "4711\n"
    assert (site.run_dir.with_name("b") / "checkpoints/latest").readlink().name == "checkpoint-10"


def logged(step: int, rate: float) -> str:
    return json.dumps({"step": step, "learning_rate": rate}) + "\n"


def test_a_resumed_run_whose_learning_rate_jumps_says_from_what_to_what(site):
    site.make_checkpoint(10)
    metrics = site.run_dir / "metrics.jsonl"
    # Step 11 came after the checkpoint, and will be trained again; an evaluation has no rate.
    metrics.write_text(
        logged(9, 9e-3) + logged(10, 1e-2) + '{"step": 10, "x": 1}\n' + logged(11, 5)
    )
    assert "jumps" not in site.submit("--dry-run").stderr
    assert "jumps" not in site.submit("--dry-run", "train.max_steps=4000").stderr
    told = (
        "jumps: by these settings it is {} at step 10, which was trained at 0.01; step 11 will be "
    )
    doubled = told.format("0.02") + "at 0.0196\n"
    assert doubled in site.submit("--dry-run", "optim.learning_rate=0.02").stderr
    warming = told.format("0.0005") + "at 0.00055\n"
    assert warming in site.submit("--dry-run", "optim.warmup_steps=200").stderr
    site.make_checkpoint(20)  # the end, as it was; now the run is to go further
    metrics.write_text(logged(20, 1.18e-3))
    told = "at step 20, which was trained at 0.00118; step 21 will be at 0.00993"
    assert told in site.submit("--dry-run", "train.max_steps=200").stderr


def test_a_schedule_that_cannot_be_is_refused_before_the_queue(site):
    wsd = "optim.lr_scheduler_type=warmup_stable_decay"
    line = complaint(site.submit(wsd, "optim.lr_scheduler_kwargs={num_decay_steps: 50}"), 2)
    assert "and 50 num_decay_steps do not fit into 20 steps; write num_decay_steps=10" in line
    line = complaint(site.submit("--dry-run", "optim.lr_scheduler_type=cosine"), 2)
    assert "cosine takes num_cycles, and not min_lr_rate" in line
    # Without max_steps the data decide how many steps there are.
    epochs = ("train.max_steps=null", "train.num_train_epochs=1")
    assert "(its peak), " in site.submit("--dry-run", *epochs).stderr
    told = site.submit("--dry-run", *epochs, "optim.warmup_steps=5000", "eval.eval_steps=epoch")
    assert "steps of the run are warm-up, which ends at" in told.stderr
    assert re.search(r"submit.sh: eval.eval_steps=epoch: every \d+ steps\n", told.stderr)


def remove_model(home: Path) -> None:
    shutil.rmtree(home / "models" / "tiny")


def remove_data(home: Path) -> None:
    shutil.rmtree(home / "datasets" / "tiny")


def remove_tokens(home: Path) -> None:
    shutil.rmtree(home / "tokens")


def damage_tokens(home: Path) -> None:
    (path,) = {path.resolve() for path in (home / "tokens").glob("*/train.bin")}
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def shorten_model(home: Path) -> None:
    (home / "models" / "tiny" / "tokenizer.json").write_text("{")


INPUTS = [
    (remove_model, "model tiny is not in the project's folder yet"),
    (remove_data, "data set tiny is not in the project's folder yet"),
    (remove_tokens, "the tokens of tiny are not ready"),
    (damage_tokens, "the tokens of tiny are not ready (train.bin: hash differs)"),
    (shorten_model, "model tiny is damaged"),
]


@pytest.mark.parametrize(
    ("damage", "what"), INPUTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_inputs_that_are_missing_or_damaged_are_named_with_the_command_to_run(site, damage, what):
    damage(site.home)
    line = complaint(site.submit(), 1)
    assert what in line
    assert line.endswith("; run: bash download_data_model.sh")
    assert not site.run_dir.exists()


def test_inputs_that_do_not_fit_the_settings_are_named(site):
    line = complaint(site.submit("model.init=pretrained"), 1)
    assert "model tiny is here without its weights" in line
    assert line.endswith("model.init=pretrained, or set model.init=scratch")
    assert "the tokens of tiny are not ready" in complaint(site.submit("data.text_field=body"), 1)


def test_a_local_file_that_is_not_there_is_not_sent_to_the_download(site):
    line = complaint(site.submit("data.name=./gone.jsonl"), 1)
    assert line.endswith("gone.jsonl is not there: no such file or folder; check its path"), line


def test_epochs_that_do_nothing_are_told_where_they_were_set(site):
    said = "train.num_train_epochs is not used: train.max_steps decides unless it is null"
    assert said in site.submit("--dry-run", "train.num_train_epochs=3").stderr
    assert said not in site.submit("--dry-run").stderr


def test_the_command_to_run_names_the_config_file_and_settings_that_it_needs(site):
    shutil.copy(site.checkout / "config.yaml", site.cwd / "my own.yaml")
    line = complaint(site.submit("--config", "my own.yaml", "model.name=org/x", "run.name=b"), 1)
    assert "model org/x is not in the project's folder yet" in line
    command = "bash download_data_model.sh --config 'my own.yaml' model.name=org/x"
    assert line.endswith(f"; run: {command}")


def other_model(site, **changes) -> None:
    """Put another config.json into the model's folder; its tokenizer, so its tokens, stay."""
    model = site.home / "models" / "tiny"
    content = {n: (model / n).read_text() for n in ("tokenizer.json", "tokenizer_config.json")}
    values = {**json.loads((model / "config.json").read_text()), **changes}
    shutil.rmtree(model)
    tiny.publish(model, {**content, "config.json": json.dumps(values)}, kind="model")


def test_a_disk_without_room_for_two_checkpoints_is_told_with_both_sizes(site):
    other_model(site, hidden_size=2**20)  # as large as that is never built
    line = site.submit().stderr.splitlines()[-1]
    assert re.search(r"two checkpoints of tiny need 158\.\d TB, and .* are free at .*; free", line)


def test_a_model_that_cannot_be_trained_is_refused_before_the_queue(site):
    other_model(site, model_type="t5", architectures=["T5ForConditionalGeneration"])
    refused = site.submit("--dry-run")
    assert refused.returncode == 2 and not refused.stdout
    assert re.fullmatch(
        r"submit.sh: error: model tiny cannot be trained as configured: t5 .*"
        r"is an encoder-decoder model, .*; choose a causal LM.*",
        refused.stderr.splitlines()[-1],
    )
    assert "Traceback" not in refused.stderr and not site.submissions()


def test_data_smaller_than_one_batch_is_told_with_both_numbers(site):
    line = complaint(site.submit("train.global_batch_size=4096"), 2)
    assert re.search(
        r"tiny: \d+ sequences of 32 tokens, less than train.global_batch_size=4096", line
    )


@pytest.mark.parametrize("kind", ["a file", "a link to nothing", "a link to a folder"])
def test_a_run_folder_that_is_none_is_named_and_left_alone(site, kind):
    site.run_dir.parent.mkdir()
    elsewhere = site.folder / "precious"
    if kind == "a file":
        site.run_dir.write_text("mine")
    else:
        site.run_dir.symlink_to(elsewhere)
    if kind == "a link to a folder":
        elsewhere.mkdir()
    assert "is not a folder; move it away, or choose another" in complaint(site.submit(), 1)
    if kind == "a file":
        assert site.run_dir.read_text() == "mine"
    assert not elsewhere.exists() or not list(elsewhere.iterdir())


def test_the_snapshot_is_complete_and_an_edit_of_the_checkout_does_not_reach_it(site):
    assert site.submit().returncode == 0
    code = site.run_dir / "code"
    kept = {path.relative_to(code) for path in code.rglob("*") if path.is_file()}
    package = site.checkout / "trainstack"
    own = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    modules = {path.relative_to(site.checkout) for path in own}
    others = (
        "train.py", "train.slurm", "job.sh", "slurm.sh", "requirements.txt", "submit.sh",
        "setup.sh", "monitor.sh", "config.yaml", "env.sh", "job.slurm", "requirements-wandb.txt",
        "requirements-trackio.txt",
    )  # fmt: skip
    assert kept == modules | {Path(name) for name in others}
    for path in kept - {Path("job.slurm")}:  # with what the command line replaces
        assert (code / path).read_bytes() == (site.checkout / path).read_bytes()
    (site.checkout / "train.py").write_text("edited")
    (site.checkout / "trainstack" / "new.py").write_text("edited")
    assert "edited" not in (code / "train.py").read_text()
    assert site.submit().returncode == 0  # again: the new code
    assert (code / "train.py").read_text() == "edited"
    assert (code / "trainstack" / "new.py").exists()


def test_a_checkout_may_lack_the_packages_of_trackers(site):
    (site.checkout / "requirements-wandb.txt").unlink()
    assert site.submit().returncode == 0
    assert not (site.run_dir / "code" / "requirements-wandb.txt").exists()
    assert (site.run_dir / "code" / "requirements-trackio.txt").exists()
    refused = complaint(site.submit("run.name=other", "log.report_to=[wandb]"), 2)
    assert "wandb is not installed; run: TRACKERS=wandb bash setup.sh" in refused


def test_the_snapshot_holds_the_whole_package_whatever_folders_it_has(site):
    """A module that is not copied would be missed by the job alone, after its wait in the queue."""
    package = site.checkout / "trainstack"
    (package / "room" / "inner" / "__pycache__").mkdir(parents=True)
    (package / "room" / "__init__.py").write_text("from trainstack.room.inner import thing\n")
    (package / "room" / "inner" / "__init__.py").touch()
    (package / "room" / "inner" / "thing.py").touch()
    (package / "room" / "inner" / "words.txt").touch()
    (package / "room" / "inner" / "__pycache__" / "thing.cpython-312.pyc").write_text("of before")
    (package / "room" / ".#thing.py").symlink_to("me@here.1234")  # as emacs locks an open file
    (package / "room").chmod(0o500)
    assert site.submit().returncode == 0
    copy = site.run_dir / "code" / "trainstack"
    names = {str(p.relative_to(copy)) for p in (copy / "room").rglob("*") if p.is_file()}
    inner = {f"room/inner/{name}" for name in ("__init__.py", "thing.py", "words.txt")}
    assert names == {"room/__init__.py", *inner}
    assert (copy / "room").stat().st_mode & 0o700 == 0o700  # the next submit can replace it
    code = (
        "import importlib, pkgutil, trainstack as package\n"
        "for module in pkgutil.walk_packages(package.__path__, 'trainstack.'):\n"
        "    print(importlib.import_module(module.name).__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=site.cwd, timeout=120,
        env={"PYTHONPATH": str(copy.parent), "PYTHONSAFEPATH": "1", "HOME": str(site.folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    imported = {Path(line) for line in done.stdout.splitlines()}
    assert imported == set(copy.rglob("*.py")) - {copy / "__init__.py"}


def test_the_environment_of_a_run_is_kept_with_commit_difference_and_packages(site):
    git = ["git", "-C", site.checkout, "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for command in (["init", "-q"], ["add", "config.yaml"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    with (site.checkout / "config.yaml").open("a") as file:
        file.write("# my change: eos_token = tokenizer.eos_token\n# KEY: hf_" + "a1" * 17 + "\n")
    assert site.submit().returncode == 0
    kept = json.loads((site.run_dir / "environment.json").read_text())
    assert kept["git_commit"] == commit.strip()
    assert "+# my change: eos_token = tokenizer.eos_token\n+# KEY: ..." in kept["git_difference"]
    assert kept["packages"]["torch"]
    assert kept["python"] == ".".join(map(str, sys.version_info[:3]))


def test_it_works_without_home_in_the_c_locale_and_with_an_open_umask(site):
    result = site.submit(HOME=None, LANG=None, LC_ALL="C", TZ="Pacific/Chatham")
    assert result.stdout == "4711\n", result.stderr


def fake_torchrun(site: Site) -> None:
    """A Python that starts no ranks but writes what they would write."""
    body = (
        'if [[ "$1 $2" == "-m trainstack.job.launch" ]]; then\n'
        f"  {site.commands.keep('torchrun')}\n"
        '  while (($#)); do if [[ "$1" == --job ]]; then job="$2"; fi; shift; done\n'
        '  printf \'{"state": "DONE", "job": "%s", "attempt": 1}\' "$job" >'
        f"{shlex.quote(str(site.run_dir))}/status.json\n"
        "  exit 0\n"
        "fi\n"
    )
    site.python.write_text(f'#!{BASH}\n{body}exec {shlex.quote(sys.executable)} "$@"\n')


def test_a_local_run_is_the_same_job_without_slurm(site):
    fake_torchrun(site)
    for name in ("sbatch", "squeue", "scontrol", "srun"):
        site.commands.remove(name)
    result = site.submit("--local")
    assert result.returncode == 0, result.stderr
    assert f"run first -> {site.run_dir}" in result.stderr
    (call,) = site.commands.calls("torchrun")
    job = call[call.index("--job") + 1]
    assert re.fullmatch(rf"local-{re.escape(os.uname().nodename)}-\d+-\d+", job)
    stop_file = f"{site.run_dir}/logs/{job}.0.stop"
    assert call == [
        "-m", "trainstack.job.launch", "--run", str(site.run_dir), "--job", job, "--attempt", "1",
        "--stop-file", stop_file, "--", "--max-restarts=0", "--standalone", "--nnodes=1",
        "--nproc-per-node=2", f"{site.run_dir}/code/train.py", "--config",
        f"{site.run_dir}/config.yaml", "--home", str(site.home), "--job", job, "--attempt", "1",
        "--restarts", "0", "--stop-file", stop_file, "--expect-world-size", "2",
    ]  # fmt: skip
    seen = site.commands.environment("torchrun")
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert "HF_TOKEN" not in seen


def test_a_local_run_that_was_done_goes_further_when_it_is_asked_to(site):
    fake_torchrun(site)
    RunFolder(site.run_dir).create()
    RunFolder(site.run_dir).set_status("DONE", step=20)
    result = site.submit("--local", "train.max_steps=30")
    assert result.returncode == 0, result.stderr
    assert len(site.commands.calls("torchrun")) == 1


def test_a_local_run_takes_a_fault_on_demand_and_no_chain_along(site):
    fake_torchrun(site)
    fault = "kill:rank=1,step=25"
    result = site.submit("--local", TRAINSTACK_FAULT=fault, TRAINSTACK_CHAIN="1")
    assert result.returncode == 0, result.stderr
    (call,) = site.commands.calls("torchrun")
    assert call[-2:] == ["--fault", fault]
    assert "TRAINSTACK_CHAIN" not in site.commands.environment("torchrun")


GPUS = [
    ("echo 'GPU 0: H100'; echo 'GPU 1: H100'; echo 'GPU 2: H100'", None, "3"),
    ("echo 'GPU 0: H100'; echo 'GPU 1: H100'; echo 'GPU 2: H100'", "0,2,1,5", "4"),
    ("echo 'GPU 0: H100'; echo 'GPU 1: H100'; echo 'GPU 2: H100'", "", "2"),
    ("echo 'GPU 0: H100'; echo 'GPU 1: H100'; echo 'GPU 2: H100'", "-1", "2"),
    ("echo 'No devices were found'; exit 6", None, "2"),
]


@pytest.mark.parametrize(("smi", "visible", "processes"), GPUS)
def test_a_local_run_takes_the_gpus_that_it_may_see(site, smi, visible, processes):
    fake_torchrun(site)
    site.commands.add("nvidia-smi", smi)
    batch = "train.global_batch_size=24"
    result = site.submit("--local", batch, CUDA_VISIBLE_DEVICES=visible)
    assert result.returncode == 0, result.stderr
    (call,) = site.commands.calls("torchrun")
    assert f"--nproc-per-node={processes}" in call


@pytest.mark.parametrize(
    ("visible", "more", "processes"),
    [("0,1,2", {}, 3), ("", {}, 2), ("-1", {}, 2), ("", {"NPROC_PER_NODE": "5"}, 5)],
)
def test_a_batch_that_the_processes_of_this_machine_cannot_share_is_known_at_once(
    site, visible, more, processes
):
    batch = ["train.global_batch_size=7", "train.micro_batch_size=7"]
    result = site.submit("--local", *batch, CUDA_VISIBLE_DEVICES=visible, **more)
    line = complaint(result, 2)
    assert "train.global_batch_size=7" in line and f"{processes} processes" in line
    assert not (site.shared / "trainstack" / "runs").exists()


@pytest.mark.parametrize(
    "line",
    [
        "export WANDB_API_KEY=0123456789abcdef",
        "# export HF_TOKEN='hf_thisMustNeverBeSeen'",
        'export DB_PASSWORD="correct-horse"',
        "curl -H hf_thisMustNeverBeSeenAnywhere site",
        "MY_TOKEN_PATH=a MY_TOKEN=MustNeverBe1",
        "export SECRET_KEY=12345678MustNever",
    ],
)
def test_a_secret_in_the_jobs_script_is_refused_before_slurm_sees_it(site, line):
    script = site.checkout / "train.slurm"
    before = script.read_text()
    script.write_text(f"{before}\n{line}\n")
    number = len(before.splitlines()) + 2
    for how in ([], ["--local"]):
        told = complaint(site.submit(*how), 2)
        assert f"train.slurm:{number}: a secret, which Slurm and the run would keep" in told
        assert line not in told and "MustNever" not in told
    assert site.commands.calls("sbatch") == []


def test_a_tracker_that_is_not_installed_is_said_before_the_queue(site):
    told = complaint(site.submit("log.report_to=[trackio]"), 2)
    assert "trackio is not installed; run: TRACKERS=trackio bash setup.sh" in told
    assert site.submissions() == []


def test_what_only_sounds_like_a_secret_is_none(site):
    lines = ["export TOKENIZERS_PARALLELISM=false", 'export HF_TOKEN="${HF_TOKEN:-}"',
             "export WANDB_API_KEY", "MAX_TOKENS=100000000", "# pip install hf_transfer",
             "export HF_TOKEN_PATH=hf_token_file", 'SECRETS_DIR="/home/me/secrets"',
             "NUM_TOKENS='1000000000' # of hf_datasets_and_more"]  # fmt: skip
    script = site.checkout / "train.slurm"
    script.write_text("\n".join([script.read_text(), *lines, ""]))
    assert site.submit("--dry-run").returncode == 0
