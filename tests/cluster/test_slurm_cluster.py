"""The test cluster itself: what is promised here, the other tests on Slurm rely on."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm_cluster import MARKER, SlurmCluster, missing_requirements

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module", autouse=True)
def requirements() -> None:
    if missing := missing_requirements():
        pytest.skip("; ".join(missing))


@pytest.fixture(scope="module")
def cluster(requirements: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "secret")
        with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
            yield cluster


def submit(cluster: SlurmCluster, script: str, *options: str) -> str:
    options = ("--parsable", "--output=/dev/null", *options)
    return cluster.run("sbatch", *options, f"--wrap={script}").stdout.strip()


def processes_with(text: str, file: str) -> list[int]:
    """The processes with the text in their /proc/PID/`file` (environ or cmdline)."""
    pids = []
    for path in Path("/proc").glob(f"[0-9]*/{file}"):
        try:
            if text.encode() in path.read_bytes().replace(b"\0", b" "):
                pids.append(int(path.parent.name))
        except OSError:
            pass  # it ended meanwhile
    return pids


def test_every_host_has_its_own_name_and_gpus_and_knows_the_others(cluster: SlurmCluster):
    script = "echo $(hostname) $CUDA_VISIBLE_DEVICES $(getent hosts node3)"
    output = cluster.run("srun", "-N3", "--gpus-per-node=2", "sh", "-c", script).stdout
    third = f"{cluster.address}3 node3"
    assert sorted(output.splitlines()) == [f"node{n} 0,1 {third}" for n in (1, 2, 3)]


def test_a_job_that_exits_with_3_has_failed(cluster: SlurmCluster):
    job_id = submit(cluster, "exit 3")
    assert cluster.wait(job_id) == "FAILED"
    assert cluster.job(job_id)["ExitCode"] == "3:0"


def test_a_wait_in_vain_says_what_the_job_is_and_shows_the_logs(cluster: SlurmCluster):
    job_id = submit(cluster, "exit 3")
    assert cluster.wait(job_id) == "FAILED"
    with pytest.raises(TimeoutError, match=r"(?s)is FAILED.*not TIMEOUT.*--- slurmctld\n\["):
        cluster.wait(job_id, states={"TIMEOUT"}, timeout=0.5)


def test_nothing_of_our_environment_gets_in_unless_a_job_exports_it(
    cluster: SlurmCluster, tmp_path: Path
):
    job_id = submit(cluster, f"env > {tmp_path}/env", "--export=NONE")
    assert cluster.wait(job_id) == "COMPLETED"
    names = {line.partition("=")[0] for line in (tmp_path / "env").read_text().splitlines()}
    assert "SLURM_JOB_ID" in names
    assert "HF_TOKEN" not in names
    daemons = processes_with(f"{MARKER}={cluster.tag}", "environ")
    assert not {*daemons} & {*processes_with("HF_TOKEN=secret", "environ")}


@pytest.mark.parametrize("proctrack", ["linuxproc", "cgroup"])
def test_nothing_is_left_after_the_end_not_even_of_a_running_job(tmp_path: Path, proctrack: str):
    if missing := missing_requirements(proctrack):
        pytest.skip("; ".join(missing))
    # The job leaves a process behind that has neither its parent nor its environment.
    stray = f"sleep {10**8 + os.getpid()}"
    hosts_file = Path("/etc/hosts").read_text()
    cluster = SlurmCluster(tmp_path, hosts=("left1", "left2"), proctrack=proctrack)
    with cluster:
        mark = f"{MARKER}={cluster.tag}"
        job_id = submit(cluster, f"env -i setsid {stray} & srun sleep 1000", "--nodes=2")
        cluster.wait(job_id, states={"RUNNING"})
        cluster._until(lambda: processes_with(stray, "cmdline"), 10, "the job started nothing")
        assert processes_with(mark, "environ")
        assert cluster.tag in cluster.run("ip", "link").stdout
    assert not processes_with(stray, "cmdline")
    assert not processes_with(mark, "environ")
    assert cluster.tag not in cluster.run("ip", "link").stdout
    assert cluster.tag not in Path("/proc/mounts").read_text()
    assert not [*Path("/run").glob(f"{cluster.tag}*"), *Path("/sys/fs/cgroup").glob("*/*left1*")]
    assert Path("/etc/hosts").read_text() == hosts_file
