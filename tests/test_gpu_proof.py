"""The proof for a GPU node, on a CPU: its driver works, and no check passes that was not made."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from gpu import driver
from gpu.bench import CHECKS, Bench, Check, Site

SCRIPT = tiny.ROOT / "tests" / "gpu.sh"


def call(*arguments: str, **changes: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRAINSTACK_PYTHON": sys.executable, **changes}
    return subprocess.run(
        ["bash", SCRIPT, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )


def lines(folder: Path) -> dict[str, dict]:
    found = map(json.loads, (folder / "gpu.jsonl").read_text().splitlines())
    return {line["check"]: line for line in found}


def prove(tmp_path: Path, seconds: float, device: str, *checks: Check) -> int:
    site = Site(tmp_path / "site", device, "a card")
    return driver.prove([*checks], site, tmp_path / "gpu.jsonl", seconds)


def passes(bench: Bench):
    """Passes."""
    bench.at_most("apart", 0.0001234567, 1e-3)
    bench.note(kernel="flash")


def fails(bench: Bench):
    """Measures too little."""
    bench.at_least("mfu", 0.1, 0.45)
    bench.equal("state", "FAILED", "DONE")


def raises(bench: Bench):
    """Is broken itself."""
    raise ValueError("a check that is broken")


def is_late(bench: Bench):
    """Waits for a process that never ends."""
    code = "import subprocess, sys; subprocess.run(['sleep', '600'])"
    bench.call([sys.executable, "-c", code], "sleep")


def test_checks_of_a_cpu_pass_and_those_of_a_gpu_say_that_they_need_one(tmp_path):
    done = call("--device", "cpu", "--only", "documents", "leaving", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = lines(tmp_path)
    assert {name: line["result"] for name, line in found.items()} == {
        "documents": "passed", "leaving": "needs a GPU",
    }  # fmt: skip
    assert found["documents"]["measured"]["kernel"] == "documents"
    assert found["documents"]["measured"]["gradients"] < 1e-5
    assert found["documents"]["card"].startswith("CPU, torch ")
    assert json.loads(done.stdout.splitlines()[0])["check"] in found
    assert "1 NEED A GPU" in done.stdout and "1 passed" in done.stdout


def test_a_check_that_fails_raises_or_is_late_gives_its_line_and_the_others_go_on(tmp_path):
    checks = [Check(f.__name__, f, 1.0, False, False) for f in (fails, raises, is_late, passes)]
    started = time.monotonic()
    assert prove(tmp_path, 60, "cuda", *checks) == 1
    assert time.monotonic() - started < 10
    found = lines(tmp_path)
    results = [line["result"] for line in found.values()]
    assert sorted(results) == ["error", "failed", "failed", "passed"]
    assert found["passes"]["measured"] == {"apart": 0.0001235, "kernel": "flash"}
    assert found["passes"]["limit"] == {"apart": "<= 0.001"}
    assert found["fails"]["missed"] == ["mfu 0.1, not >= 0.45", "state FAILED, not = DONE"]
    assert "ValueError: a check that is broken" in found["raises"]["error"]
    assert found["is_late"]["error"].startswith("took longer than 1 s")


def test_what_a_late_check_started_is_ended_with_it(tmp_path):
    prove(tmp_path, 60, "cuda", Check("is_late", is_late, 1.0, False, False))
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "subprocess.run(['sleep', '600'])" not in shown


@pytest.mark.parametrize("is_timing", [False, True])
def test_a_check_that_no_time_is_left_for_has_not_passed(tmp_path, is_timing):
    late = Check("passes", passes, 60.0, False, is_timing)
    assert prove(tmp_path, driver.LEAST_SECONDS - 1, "cpu", late) == 1
    (line,) = lines(tmp_path).values()
    assert (line["result"], line["error"]) == ("error", driver.NO_TIME)


def test_on_a_cpu_a_check_of_the_gpu_never_passes_and_never_hides_that_it_is_broken(tmp_path):
    checks = [Check(f.__name__, f, 9.0, True, False) for f in (passes, fails, raises)]
    assert prove(tmp_path, 60, "cpu", *checks) == 1
    found = lines(tmp_path)
    expected = {"passes": "needs a GPU", "fails": "needs a GPU", "raises": "error"}
    assert {name: line["result"] for name, line in found.items()} == expected


def test_a_name_that_is_none_and_a_folder_without_wheels_are_told():
    wrong = call("--only", "attention")
    assert wrong.returncode == 2 and "no check attention; there are: runs," in wrong.stderr
    missing = call("--wheels", str(tiny.ROOT))
    assert missing.returncode == 2 and "there is no .whl file in it" in missing.stderr
    listed = call("--list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [c.name for c in CHECKS]
    assert all(len(line.split()) > 4 and len(line) <= 121 for line in listed.stdout.splitlines())
