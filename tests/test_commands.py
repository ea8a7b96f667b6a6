"""python -m trainstack: one door to all commands, which loads only the one that is called."""

import subprocess
import sys

import pytest

import tiny
from trainstack.__main__ import COMMANDS


def call(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "trainstack", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=tiny.ROOT)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_name_all_commands_are_listed_with_what_they_do(arguments):
    result = call(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    head, _, *lines = result.stdout.splitlines()
    assert head.startswith("usage: python -m trainstack COMMAND ...")
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(len(line.split()) > 4 and len(line) <= 100 for line in lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_its_own_help_under_the_name_by_which_it_is_called(name):
    result = call(name, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: python -m trainstack {name} ")


def test_a_command_gets_its_arguments_and_gives_its_exit_code_back():
    result = call("config", "--config", str(tiny.ROOT / "config.yaml"), "run.name=mine")
    assert (result.returncode, result.stderr) == (0, "")
    assert "name: mine" in result.stdout
    assert call("config", "--config", "nowhere.yaml").returncode == 2


WRONG = [
    ("legder", "no command legder; did you mean ledger?"),
    ("data-report", "no command data-report; did you mean data_report?"),
    ("xyz", "no command xyz; there are: config, hub, prove, prepare, data_report, plan, "),
    ("--version", "no command --version; there are: config, hub"),
]


@pytest.mark.parametrize(("name", "problem"), WRONG)
def test_a_name_that_is_none_is_one_line_with_the_nearest_name(name, problem):
    result = call(name)
    assert (result.returncode, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"trainstack: error: {problem}")


def test_a_reader_that_goes_away_and_a_wrong_python_leave_no_traceback():
    command = f"{sys.executable} -m trainstack config | true; exit ${{PIPESTATUS[0]}}"
    closed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tiny.ROOT)
    assert closed.returncode in (0, 141) and closed.stderr == ""
    for what in (["-m", "trainstack"], ["train.py"]):
        bare = [sys.executable, "-S", *what]  # without site-packages
        result = subprocess.run(bare, capture_output=True, text=True, cwd=tiny.ROOT)
        (line,) = result.stderr.splitlines()
        assert result.returncode == 1 and "is not the Python that setup.sh made; write: sou" in line


def test_the_list_loads_nothing_but_the_standard_library():
    code = "import sys; from trainstack.__main__ import main; main([]); print(*sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tiny.ROOT)
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "trainstack" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "pydantic", "yaml", "datasets"}
