"""setup.sh with a Python, a uv and a conda that only pretend: nothing is ever installed here."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fake_site import BASH, HOSTILE, Commands, complaint, end_group

import tiny
from lab import wait_until

READY = "ready: Python 3.12.1, pretended"
FOLDERS = {"venv", "cache", "models", "datasets", "tokens", "runs"}


class Machine:
    """A checkout, an empty shared folder, and a PATH with a python3 of a wanted version."""

    def __init__(self, folder: Path):
        self.folder, self.checkout = folder, folder / f"checkout {HOSTILE}"
        self.shared = folder / f"shared {HOSTILE}"
        self.home = self.shared / "trainstack"
        self.hook = folder / "install"  # what the fake pip does
        self.started: list[subprocess.Popen] = []
        self.checkout.mkdir()
        for path in (tiny.ROOT / "setup.sh", *tiny.ROOT.glob("requirements*.txt")):
            (self.checkout / path.name).write_bytes(path.read_bytes())
        self.commands = Commands(folder)
        self.installs("")
        self.add_python("3.12.1")

    def installs(self, body: str) -> None:
        self.hook.write_text(body + "\n")

    def add_python(self, version: str, name: str = "python3") -> None:
        """A Python that tells its version, makes environments of its kind, and 'installs'."""
        log = shlex.quote(str(self.commands.log / "pip"))
        is_old = tuple(map(int, version.split("."))) < (3, 11)
        body = (
            f'case "$*" in\n'
            f"  *sys.version_info*) exit {int(is_old)} ;;\n"
            f"  *python_version*) echo {version} ;;\n"
            f'  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;\n'
            f"  \"-m pip install \"*) printf '%s\\0' \"$@\" >>{log}; printf '\\036' >>{log}\n"
            f"    source {shlex.quote(str(self.hook))} ;;\n"
            f'  -) cat >/dev/null; echo "Python {version}, pretended" ;;\n'
            f"esac"
        )
        self.commands.add(name, body)

    def start(self, *arguments: str, **changes: str) -> subprocess.Popen:
        environment = {
            "PATH": str(self.commands.folder), "HOME": str(self.folder), "LANG": "C.UTF-8",
            "SHARED_DIR": str(self.shared), "MIN_FREE_GB": "0", **changes,
        }  # fmt: skip
        environment = {name: value for name, value in environment.items() if value is not None}
        process = subprocess.Popen(
            [BASH, self.checkout / "setup.sh", *arguments], env=environment, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def setup(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
        return finish(self.start(*arguments, **changes))

    def pins(self) -> str:
        return (self.home / "venv" / ".pins").read_text()

    def change_pins(self) -> None:
        with (self.checkout / "requirements.txt").open("a") as file:
            file.write("another==1\n")


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    output, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def error_of(result: subprocess.CompletedProcess, code: int) -> str:
    """The last line, which is the one with the error; earlier ones tell what was going on."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert [line for line in lines if "error: " in line and line.startswith("setup.sh")] == lines[
        -1:
    ]
    assert lines[-1].startswith("setup.sh: error: ")
    return lines[-1]


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    yield machine
    for process in machine.started:
        end_group(process)
    assert not list(tmp_path.rglob("canary"))


def test_the_first_setup_makes_folders_environment_and_env_sh(machine):
    result = machine.setup()
    assert (result.returncode, result.stdout) == (0, "")
    first, last = result.stderr.splitlines()
    assert first.startswith("setup.sh: no environment yet; installing into ")
    assert last == f"setup.sh: {READY}, in {machine.home}"
    assert {path.name for path in machine.home.iterdir()} >= FOLDERS
    (call,) = machine.commands.calls("pip")
    assert call[-2:] == ["--requirement", f"{machine.checkout}/requirements.txt"]
    assert (machine.checkout / "env.sh").exists()
    assert not (machine.home / ".setup.lock").exists()


def test_the_second_setup_changes_nothing(machine):
    machine.setup()
    before = {path: path.stat().st_mtime_ns for path in machine.folder.rglob("*.*")}
    result = machine.setup()
    assert (result.returncode, result.stderr.count("\n")) == (0, 1)
    assert READY in result.stderr
    assert len(machine.commands.calls("pip")) == 1
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_goes_beside_the_environment_is_installed_once_and_changes_nothing_in_it(machine):
    tools = machine.checkout / "tools.txt"
    tools.write_text("pytest==9\n")
    assert "no environment yet; run: bash setup.sh" in error_of(
        machine.setup("--beside", str(tools)), 1
    )
    machine.setup()
    pins = machine.pins()
    first, second = (machine.setup("--beside", str(tools)) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    _, call = machine.commands.calls("pip")
    folder = first.stdout.rstrip("\n")
    assert call[call.index("--target") + 1] == folder
    assert call[call.index("--requirement") + 1] == str(tools)
    assert "--no-deps" in call
    assert machine.pins() == pins
    assert "--beside needs a requirements file" in error_of(machine.setup("--beside", "no"), 2)


def test_trackers_are_installed_once_each_apart_from_the_environment(machine):
    for _ in range(2):
        assert machine.setup(TRACKERS="trackio wandb").returncode == 0
    assert machine.setup().returncode == 0  # they stay
    environment, *calls = machine.commands.calls("pip")
    assert "--target" not in environment
    named = [Path(call[call.index("--requirement") + 1]).name for call in calls]
    assert named == ["requirements-trackio.txt", "requirements-wandb.txt"]
    assert len({call[call.index("--target") + 1] for call in calls}) == 2
    told = complaint(machine.setup(TRACKERS="mlflow"), 2, "setup.sh")
    assert "TRACKERS=mlflow is not known; write wandb, trackio" in told


def test_a_tracker_that_cannot_be_installed_is_said_with_a_fix(machine):
    machine.installs('[[ "$*" != *wandb* ]] || exit 3')
    told = machine.setup(TRACKERS="wandb")
    assert told.returncode == 1
    assert "requirements-wandb.txt could not be installed" in told.stderr.splitlines()[-1]


def test_a_check_is_silent_and_makes_nothing(machine):
    result = machine.setup("--is-ready")
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "")
    assert not machine.shared.exists()
    machine.setup()
    (machine.checkout / "env.sh").unlink()
    result = machine.setup("--is-ready")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (machine.checkout / "env.sh").exists()  # a second checkout beside a ready folder
    machine.change_pins()
    assert machine.setup("--is-ready").returncode == 1


WRONG = [
    ({"SHARED_DIR": "relative"}, 2, "SHARED_DIR=relative is not an absolute path; write one that"),
    ({"SHARED_DIR": "/a\nb"}, 2, "is not an absolute path"),
    ({"PROJECT_NAME": "a/b"}, 2, "PROJECT_NAME=a/b is not a plain folder name; use letters"),
    ({"PROJECT_NAME": "$(touch canary)"}, 2, "is not a plain folder name"),
    ({"PROJECT_NAME": "-p"}, 2, "is not a plain folder name"),
    ({"ENV_TOOL": "pip"}, 2, "ENV_TOOL=pip is not known; write venv, uv or conda"),
    ({"MIN_FREE_GB": "x[$(touch canary)]"}, 2, "is not a whole number; write for example 8"),
    ({"SHARED_DIR": "/proc/nobody"}, 1, "SHARED_DIR=/proc/nobody cannot be written; choose anot"),
    ({"MIN_FREE_GB": "999999"}, 1, "GB free, the environment needs 999999 GB; free some, or"),
    ({"MODULES": "python/3.12"}, 1, "there is no module command here; clear it"),
]


@pytest.mark.parametrize(("changes", "code", "fix"), WRONG, ids=lambda value: str(value)[:30])
def test_a_setting_that_cannot_be_is_one_line_with_its_fix(machine, changes, code, fix):
    result = machine.setup(**changes)
    assert fix in result.stderr
    if "\n" not in changes.get("SHARED_DIR", ""):
        assert fix in complaint(result, code, "setup.sh")
    assert machine.commands.calls("pip") == []
    assert not (machine.home / ".setup.lock").exists()


def test_a_shared_folder_that_is_a_file_is_told_as_such(machine):
    machine.shared.write_text("")
    assert "cannot be written; choose another" in complaint(machine.setup(), 1, "setup.sh")


def test_without_a_new_enough_python_the_version_that_was_found_is_named(machine):
    machine.add_python("3.8.10")
    line = error_of(machine.setup(), 1)
    assert "no Python >= 3.11 here (python3 is 3.8.10); load one" in line
    assert "install uv" in line


def test_without_any_python_that_is_said(machine):
    machine.commands.remove("python3")
    assert "no Python >= 3.11 here (python3 is not there)" in error_of(machine.setup(), 1)


def test_a_newer_python_beside_an_old_one_is_found(machine):
    machine.add_python("3.8.10")
    machine.add_python("3.12.1", "python3.12")
    assert READY in machine.setup().stderr


def add_uv(machine: Machine) -> None:
    machine.add_python("3.12.1", "newer")
    newer = shlex.quote(str(machine.commands.folder / "newer"))
    make = f'mkdir -p "${{@: -1}}/bin"; cp {newer} "${{@: -1}}/bin/python"'
    machine.commands.add("uv", f'if [[ "$1" == venv ]]; then {make}; fi')


def add_conda(machine: Machine, name: str = "conda") -> None:
    machine.add_python("3.12.1", "newer")
    newer = shlex.quote(str(machine.commands.folder / "newer"))
    machine.commands.add(name, f'mkdir -p "$4/bin"; cp {newer} "$4/bin/python"')


def test_an_old_python_is_no_obstacle_where_there_is_uv(machine):
    machine.add_python("3.8.10")
    add_uv(machine)
    result = machine.setup()
    assert READY in result.stderr
    assert "taking Python from uv" in result.stderr
    ((*call, new),) = machine.commands.calls("uv")
    assert call == ["venv", "--seed", "--python", ">=3.11,<3.14"]
    assert Path(new).name == os.readlink(machine.home / "venv")


@pytest.mark.parametrize("name", ["conda", "mamba"])
def test_an_old_python_is_no_obstacle_where_there_is_conda(machine, name):
    machine.add_python("3.8.10")
    add_conda(machine, name)
    result = machine.setup()
    assert READY in result.stderr
    assert f"taking Python from {name}" in result.stderr
    ((*start, _, _, pip),) = machine.commands.calls(name)
    assert (start, pip) == (["create", "--yes", "--prefix"], "pip")


def test_with_uv_chosen_uv_installs_as_well(machine):
    add_uv(machine)
    assert READY in machine.setup(ENV_TOOL="uv").stderr
    install = machine.commands.calls("uv")[1]
    assert install[:4] == ["pip", "install", "--compile-bytecode", "--python"]
    assert machine.commands.calls("pip") == []


@pytest.mark.parametrize(("tool", "fix"), [("uv", "uv is not on the PATH"), ("conda", "mamba")])
def test_a_chosen_tool_that_is_not_there_is_named(machine, tool, fix):
    assert fix in error_of(machine.setup(ENV_TOOL=tool), 1)


def test_a_failed_install_shows_its_last_lines_and_leaves_the_environment_of_before(machine):
    machine.setup()
    link, pins = os.readlink(machine.home / "venv"), machine.pins()
    machine.change_pins()
    machine.installs("for i in {1..9}; do echo line $i; done; echo ERROR: no such version; exit 1")
    result = machine.setup()
    line = error_of(result, 1)
    assert "its last lines are above, all of it is in" in line
    assert "line 5" not in result.stderr
    assert "    line 6\n" in result.stderr
    assert "    ERROR: no such version\n" in result.stderr
    assert (os.readlink(machine.home / "venv"), machine.pins()) == (link, pins)
    assert (machine.home / "venv" / "bin" / "python").exists()
    machine.installs("")
    assert READY in machine.setup().stderr
    assert machine.pins() != pins


def test_what_installers_keep_goes_to_the_projects_cache_unless_told_elsewhere(machine):
    """A home may have a quota of a few GB, and the wheels of CUDA exceed it."""
    seen = machine.folder / "seen"
    names = ("PIP_CACHE_DIR", "UV_CACHE_DIR", "CONDA_PKGS_DIRS")
    machine.installs(f"""printf '%s\\n' "${'" "$'.join(names)}" >{seen}""")
    machine.setup()
    cache = machine.home / "cache"
    assert seen.read_text().splitlines() == [f"{cache}/{name}" for name in ("pip", "uv", "conda")]
    machine.change_pins()
    machine.setup(**dict.fromkeys(names, "/my own/cache"))
    assert seen.read_text().splitlines() == ["/my own/cache"] * 3


CAUSES = [
    ("Max retries exceeded with url: /simple/torch", "run setup.sh where there is internet"),
    ("Temporary failure in name resolution", "or set PIP_INDEX_URL to your site's mirror"),
    ("OSError: [Errno 28] No space left on device", "is full; free some space and run setup.sh"),
    ("OSError: [Errno 122] Disk quota exceeded: '/home/me/x'", "or move PIP_CACHE_DIR=/"),
]


@pytest.mark.parametrize(("said", "fix"), CAUSES)
def test_the_common_causes_of_a_failed_install_have_their_own_fix(machine, said, fix):
    machine.installs(f"echo {shlex.quote(said)}; exit 1")
    assert fix in error_of(machine.setup(), 1)


def test_an_environment_that_does_not_import_is_not_taken_into_use(machine):
    machine.installs('printf "#!/bin/sh\\nexit 1\\n" >"$0"')
    assert "the new environment does not import; see" in error_of(machine.setup(), 1)
    assert not (machine.home / "venv").exists()
    assert machine.setup("--is-ready").returncode == 1


def test_a_killed_install_is_repaired_by_the_next_at_once(machine):
    begun = machine.folder / "begun"
    machine.installs(f"touch {begun}; sleep 60")
    killed = machine.start()
    wait_until(begun.exists, "the install", seconds=20)
    os.kill(killed.pid, signal.SIGKILL)  # its pip goes on alone
    killed.wait()
    assert (machine.home / ".setup.lock").exists()
    machine.installs("")
    result = machine.setup()
    assert READY in result.stderr
    assert "waiting" not in result.stderr
    environments = [path.name for path in machine.home.glob("venv-*")]
    assert environments == [os.readlink(machine.home / "venv")]


def test_ctrl_c_says_what_to_do_and_holds_up_nobody(machine):
    begun = machine.folder / "begun"
    machine.installs(f"touch {begun}; exec sleep 60")
    stopped = machine.start()
    wait_until(begun.exists, "the install", seconds=20)
    time.sleep(0.5)  # the sleep has begun by now: bash would wait for one that missed the signal
    os.killpg(stopped.pid, signal.SIGINT)
    result = finish(stopped)
    assert result.returncode == 130
    last = "setup.sh: stopped before the environment was ready; run it again"
    assert result.stderr.splitlines()[-1] == last
    assert not (machine.home / ".setup.lock").exists()


def test_two_at_once_install_once(machine):
    machine.installs("sleep 1")
    results = [finish(process) for process in (machine.start(), machine.start())]
    assert [result.returncode for result in results] == [0, 0]
    assert all(READY in result.stderr for result in results)
    assert sum("waiting for another setup.sh" in result.stderr for result in results) == 1
    assert len(machine.commands.calls("pip")) == 1


def test_a_lock_of_another_host_holds_until_it_is_not_touched_for_two_minutes(machine):
    lock = machine.home / ".setup.lock"
    lock.mkdir(parents=True)
    (lock / "owner").write_text("gpu-07 1\n")
    waiting = machine.start()
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=1.5)
    old = time.time() - 300
    os.utime(lock, (old, old))
    result = finish(waiting)
    assert "waiting for another setup.sh (gpu-07 1)" in result.stderr
    assert READY in result.stderr


def source_env(machine: Machine, **changes: str) -> str:
    """What a script that sources env.sh takes for the project's folder."""
    result = subprocess.run(
        [BASH, "-euc", 'source "$0"; printf %s "$TRAINSTACK_HOME"', machine.checkout / "env.sh"],
        env={"PATH": str(machine.commands.folder), **changes}, cwd=machine.folder,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return result.stdout


def test_env_sh_survives_a_hostile_folder_and_the_environment_wins(machine):
    machine.setup(PROJECT_NAME="mine")
    assert source_env(machine) == f"{machine.shared}/mine"
    assert source_env(machine, SHARED_DIR="/else where") == "/else where/mine"
    assert source_env(machine, PROJECT_NAME="other") == f"{machine.shared}/other"


def test_a_check_tells_what_is_here_in_ten_lines_and_what_to_do_next(machine):
    def told(**changes) -> dict[str, str]:
        result = machine.setup("--check", **changes)
        lines = result.stdout.splitlines()
        assert len(lines) == 9 and result.stderr == ""
        return {line[:12].strip(): line[13:] for line in lines} | {"code": str(result.returncode)}

    first = told()
    assert (first["code"], first["next"], first["environment"]) == (
        "1", "bash setup.sh", "not there yet",
    )  # fmt: skip
    assert not machine.shared.exists()
    machine.setup()
    machine.commands.add("sinfo", "echo 'gpu* 3 nodes, 64 CPUs, gpu:h100:8 each;'")
    machine.commands.add("nvidia-smi", "echo 'H100, 550.54'; echo 'H100, 550.54'")
    second = told()
    assert second["code"] == "0"
    assert second["next"].startswith("bash download_data_model.sh, then bash submit.sh (the demo)")
    assert second["environment"] == READY.removeprefix("ready: ")
    assert second["slurm"].strip() == "gpu* 3 nodes, 64 CPUs, gpu:h100:8 each;"
    assert second["GPUs here"].strip() == "2 H100, 550.54"
    assert second["holds"] == "0 models, 0 datasets, 0 tokens"


def test_an_edited_setup_that_was_not_run_again_is_noticed(machine):
    machine.setup()
    assert machine.setup("--is-ready").returncode == 0
    script = machine.checkout / "setup.sh"
    script.write_text(script.read_text().replace('ENV_TOOL:-venv}"', 'ENV_TOOL:-uv}"'))
    line = error_of(machine.setup("--is-ready"), 3)
    assert line == "setup.sh: error: setup.sh was edited since it ran last; run: bash setup.sh"
    script.write_text((tiny.ROOT / "setup.sh").read_text().replace("venv, uv or conda", "x"))
    assert machine.setup("--is-ready").returncode == 0  # a comment


def test_wheels_of_a_folder_take_the_place_of_the_internet(machine):
    assert "WHEELS=/nowhere is no folder" in error_of(machine.setup(WHEELS="/nowhere"), 2)
    machine.setup(WHEELS=str(machine.folder))
    (call,) = machine.commands.calls("pip")
    assert call[-5:-2] == ["--no-index", "--find-links", str(machine.folder)]


def test_nothing_of_a_persons_own_python_and_pip_gets_into_an_install(machine):
    machine.installs(f"env -0 >{shlex.quote(str(machine.folder))}/seen")
    machine.setup(PYTHONPATH="/x", PIP_TARGET="/y", PIP_USER="1", PYTHONUSERBASE="/z")
    text = (machine.folder / "seen").read_text()
    seen = dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)
    assert not {"PYTHONPATH", "PIP_TARGET", "PYTHONUSERBASE"} & seen.keys()
    assert (seen["PIP_USER"], seen["PYTHONNOUSERSITE"]) == ("0", "1")
    assert seen["PIP_CACHE_DIR"].startswith(str(machine.home))


def test_what_the_environment_told_once_stays_until_the_edit_block_says_otherwise(machine):
    machine.setup()
    told = machine.setup("--check", SHARED_DIR=None)
    assert f"project      {machine.home}\n" in told.stdout
    assert READY in machine.setup(SHARED_DIR=None).stderr
    script = machine.checkout / "setup.sh"
    edited = script.read_text().replace("/shared}", "/elsewhere}")
    script.write_text(edited)
    told = machine.setup("--check", SHARED_DIR=None)
    assert f"project      {machine.folder}/elsewhere/" in told.stdout


def test_a_folder_that_was_set_for_one_command_stays_with_that_command(machine):
    other = machine.folder / "other"
    machine.setup(SHARED_DIR=str(other))
    machine.setup()
    assert machine.setup("--is-ready", SHARED_DIR=str(other)).returncode == 0
    assert source_env(machine) == f"{machine.shared}/trainstack"


def test_the_group_may_write_into_the_folders(machine):
    machine.setup()
    for name in FOLDERS - {"venv"}:
        assert (machine.home / name).stat().st_mode & 0o2070 == 0o2070
