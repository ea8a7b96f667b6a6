"""Fixtures that several test files share: a tiny model with its tokens, and a real Slurm."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from slurm_cluster import missing_requirements

ROOT = Path(__file__).resolve().parent.parent
LONGEST = (  # groups of tests, by the minutes that they take
    "test_faults", "cluster", "test_download", "test_train", "test_job_shell", "test_submit",
    "test_packed", "test_ledger", "test_mixture", "test_prepare", "test_mutations",
)  # fmt: skip


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A project folder with a tiny model and a small data set, tokenised; shared, so read-only."""
    folder = tmp_path_factory.mktemp("home")
    tiny.make_model(folder)
    tiny.make_dataset(folder)
    config = tiny.write_config(folder)
    tiny.run_command("prove", "--home", folder, "--config", config)  # kept: no test tries it again
    tiny.run_command("prepare", "--home", folder, "--config", config)
    return folder


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A real Slurm of three hosts, for all tests that need one."""
    from slurm_cluster import SlurmCluster

    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def user(home, cluster, tmp_path_factory):
    """A user of that cluster, with a checkout and a shared folder whose environment is ready."""
    from slurm_user import Site

    shared = tmp_path_factory.mktemp("shared folder")
    shutil.copytree(
        home, shared / "trainstack", symlinks=True, ignore=shutil.ignore_patterns("runs")
    )
    tiny.make_checkout(shared / "checkout", shared, run__name="first")
    script = shared / "checkout" / "train.slurm"  # these hosts share the cores of one machine
    edited = re.sub(
        r"(?m)^# export OMP_NUM_THREADS=\d+", "export OMP_NUM_THREADS=1", script.read_text()
    )
    script.write_text(edited)
    return Site(shared / "checkout", cluster)


@pytest.fixture
def own_home(home, tmp_path) -> Path:
    """A copy of ``home`` that a test may damage; its runs are its own."""
    folder = tmp_path / "home"
    shutil.copytree(home, folder, symlinks=True, ignore=shutil.ignore_patterns("runs"))
    return folder


def group_of(nodeid: str) -> str:
    """One worker runs a group: the tests of a file, or of the cluster, share what is made once."""
    file = nodeid.partition("::")[0]
    return "cluster" if file.startswith("tests/cluster/") else Path(file).stem


def pytest_collection_modifyitems(items):
    """The groups that take longest begin first, or one of them would be left over at the end."""

    def place(item) -> int:
        group = group_of(item.nodeid)
        return LONGEST.index(group) if group in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)  # with a single worker nobody asks
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


what_slurm_lacks = functools.cache(missing_requirements)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip what this machine cannot run, saying why; with CI=true that is a failure instead."""
    if "slurm" not in item.keywords:
        return
    missing = what_slurm_lacks()
    if missing:
        reason = f"a real Slurm cannot run here: {'; '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{reason}. With CI=true that is a failure.")
        pytest.skip(reason)


def pytest_sessionstart():
    """The tests' own processes see neither the user's tokens nor a Hub."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "SHARED_DIR", "PROJECT_NAME", "TRAINSTACK_HOME")
    for name in names:
        os.environ.pop(name, None)
    foreign = ("SLURM_", "SBATCH_", "SQUEUE_", "WANDB_", "TRACKIO_")
    for name in [name for name in os.environ if name.startswith(foreign)]:
        del os.environ[name]  # a real site's, which may not even answer
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    assert subprocess.run([sys.executable, "-c", "import trainstack"]).returncode == 0
