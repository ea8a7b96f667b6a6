"""Each promise is broken once, in a copy of this checkout, and a test has to turn red.

A test that cannot fail is a defect; these are the ones that must not be blind.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tiny import ROOT

NOT_COPIED = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", "env.sh")


@dataclass(frozen=True)
class Mutation:
    """``edits``: (file, text that is there once, text in its place).

    ``test`` has to fail, and with ``words``: it may not be red for another reason.
    """

    test: str
    words: str
    edits: tuple[tuple[str, str, str], ...]


POWER_CUT = (
    "tests/checkpoint/test_crash_states.py::"
    "test_whatever_a_power_cut_leaves_is_as_before_or_as_it_became[a_save]"
)
MUTATIONS = {
    "no fsync of the parent folder after the rename": Mutation(
        POWER_CUT,
        "leads nowhere",
        (
            (
                "trainstack/checkpoint/publish.py",
                "        files.rename(temporary, final)\n        files.sync_folder(final.parent)\n",
                "        files.rename(temporary, final)\n",
            ),
        ),
    ),
    "the rename before the manifest": Mutation(
        POWER_CUT,
        "checkpoint-3 shows a part",
        (
            (
                "trainstack/checkpoint/publish.py",
                '    manifest.write_manifest(temporary, entries, kind="checkpoint", step=step)\n',
                "    pass\n",
            ),
            (
                "trainstack/checkpoint/publish.py",
                "        files.rename(temporary, final)\n",
                "        files.rename(temporary, final)\n"
                '        manifest.write_manifest(final, entries, kind="checkpoint", step=step)\n',
            ),
        ),
    ),
    "no look at the lease before a publish": Mutation(
        "tests/checkpoint/test_checkpoint.py::test_who_lost_the_run_folder_does_not_publish",
        "DID NOT RAISE",
        (
            (
                "trainstack/checkpoint/publish.py",
                "        self.check_owner()  # first:",
                "        # first:",
            ),
            (
                "trainstack/checkpoint/publish.py",
                "        self.check_owner()  # the last",
                "        #",
            ),
        ),
    ),
    "no look at the lease right before the rename": Mutation(
        "tests/checkpoint/test_checkpoint.py::"
        "test_who_loses_the_run_folder_during_a_save_takes_nothing_from_the_new_owner",
        "DID NOT RAISE",
        (("trainstack/checkpoint/publish.py", "self.check_owner()  # the last", "#"),),
    ),
    "an epoch filled up as DistributedSampler does by default": Mutation(
        "tests/data/test_data.py::test_every_world_size_consumes_the_same_samples_at_each_step",
        "test_every_world_size_consumes_the_same_samples_at_each_step[8]",
        (
            (
                "trainstack/data/order.py",
                "        return stream(positions, self.total_samples, self.seed)\n",
                "        filled = -(-self.total_samples // self.num_replicas) * self.num_replicas\n"
                "        return stream(positions, filled, self.seed) % self.total_samples\n",
            ),
        ),
    ),
    "packed documents that see each other": Mutation(
        "tests/model/test_model.py::test_documents_of_a_row_do_not_see_each_other",
        "lets documents of one sequence see each other",
        (
            (
                "trainstack/model/attention.py",
                "    if position_ids is None:\n",
                "    if True:\n",
            ),
        ),
    ),
    "srun in the foreground": Mutation(
        "tests/shell/test_job_shell.py::test_a_warned_job_asks_its_ranks_to_stop_and_requeues_itself",
        "the stop file did not happen",
        (
            (
                "job.sh",
                '  "${LAUNCH[@]}" &\n  wait_for "$!" || code=$?\n',
                '  "${LAUNCH[@]}" || code=$?\n',
            ),
        ),
    ),
    "no signal of death from the parent": Mutation(
        "tests/resilience/test_orphans.py::test_a_killed_torchrun_leaves_no_rank_behind",
        "Left contains 2 more items",
        (
            (
                "trainstack/processes.py",
                "    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)\n",
                "",
            ),
        ),
    ),
    "sizes compared, contents not": Mutation(
        "tests/checkpoint/test_checkpoint.py::test_every_flipped_bit_is_found_and_its_file_named",
        "AssertionError: bit ",
        (
            (
                "trainstack/storage/manifest.py",
                "            is_small = hash_up_to is None or size <= hash_up_to\n",
                "            is_small = False\n",
            ),
        ),
    ),
}


@pytest.fixture
def checkout(tmp_path) -> Path:
    return shutil.copytree(ROOT, tmp_path / "checkout", ignore=NOT_COPIED, symlinks=True)


def run_tests(checkout: Path, *tests: str) -> subprocess.CompletedProcess:
    """pytest in the copy, with the copy's own modules."""
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p != str(ROOT)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(checkout), *others]),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    command += [f"--basetemp={checkout.parent / 'tmp'}", f"--rootdir={checkout}"]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=checkout, env=environment, timeout=300
    )


@pytest.mark.matrix  # every run of the suite sees them green where they are
def test_these_tests_are_green_in_a_copy_that_is_not_broken(checkout):
    result = run_tests(checkout, *dict.fromkeys(mutation.test for mutation in MUTATIONS.values()))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]


SELDOM = {  # half a minute, or like the one before it
    "no signal of death from the parent", "the rename before the manifest",
    "no look at the lease right before the rename",
}  # fmt: skip
NAMES = [pytest.param(n, marks=pytest.mark.matrix) if n in SELDOM else n for n in MUTATIONS]


@pytest.mark.parametrize("what", NAMES)
def test_a_promise_that_is_broken_turns_its_test_red(checkout, what):
    mutation = MUTATIONS[what]
    for name, text, other in mutation.edits:
        content = (checkout / name).read_text()
        assert content.count(text) == 1, f"{name} has changed: {text!r} is not there once"
        (checkout / name).write_text(content.replace(text, other))
    result = run_tests(checkout, mutation.test)
    assert result.returncode == 1, result.stdout[-4000:] + result.stderr[-1000:]
    assert mutation.words in result.stdout, result.stdout[-4000:]
