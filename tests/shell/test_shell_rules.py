"""How the shell scripts are written: short lines, and no function that changes a name unsaid."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_site import BASH, SCRIPTS, complaint

import tiny

LONGEST_LINE = 100  # columns
DECLARED = {"local", "declare", "typeset"}
ASSIGNING = {"=", "+=", "-=", "*=", "/=", "%=", "++", "--"}
ARITHMETIC = {"ArithmCmd", "ArithmExp", "BinaryArithm", "ParenArithm", "UnaryArithm"}
NAME = re.compile(r"[A-Za-z_]\w*")


def scripts() -> list[Path]:
    """Every shell script of the project; env.sh is the user's."""
    found = [path for path in tiny.ROOT.rglob("*.sh") if path.name != "env.sh"]
    return [*sorted(found), tiny.ROOT / "train.slurm", tiny.ROOT / ".ci" / "run"]


def lint(*command, stdin: str = "") -> str:
    """Run a checker, from beside this Python or from the PATH; what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = shutil.which(command[0], path=path)
    assert found, f"{command[0]} is not installed; see tests/requirements.txt"
    result = subprocess.run(
        [found, *map(str, command[1:])], input=stdin, capture_output=True, text=True, cwd=tiny.ROOT
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


every_script = pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)


class Function:
    """A function of a script: the names that it declares, sets and uses, and those that it says."""

    def __init__(self, path: Path, tree: dict):
        self.where = f"{path.name}: {tree['Name']['Value']}"
        self.declared, self.assigned, self.used = set[str](), set[str](), set[str]()
        self.reads_a_file = False
        for node in nodes(tree["Body"]):
            self.look_at(node)
        lines = path.read_text().splitlines()[: tree["Pos"]["Line"] - 1]
        self.said = set[str]()
        while lines and lines[-1].startswith("#"):
            said = re.match(r"# Sets:((?: [A-Z_]+)+)$", lines.pop())
            self.said |= set(said[1].split()) if said else set()

    def look_at(self, node: dict) -> None:
        kind, words = node.get("Type"), [literal(word) for word in node.get("Args") or []]
        if kind == "DeclClause" and node["Variant"]["Value"] in DECLARED:
            self.declared |= {argument["Name"]["Value"] for argument in node["Args"]}
        elif kind == "CallExpr" and not words:  # with a command behind it, it is the command's
            self.assigned |= {each["Name"]["Value"] for each in node.get("Assigns") or []}
        elif kind == "CallExpr" and words[0] in ("read", "mapfile", "readarray"):
            self.assigned |= {word for word in words[1:] if NAME.fullmatch(word)}
        elif kind == "CallExpr" and words[:2] == ["printf", "-v"]:
            self.assigned.add(words[2])
        elif kind == "CallExpr" and words[0] == "trap":
            self.assigned |= set(re.findall(r"\b([A-Za-z_]\w*)=", words[1]))
        elif kind == "CallExpr" and words[0] in ("source", "."):
            self.reads_a_file = True
        elif kind == "WordIter":
            self.assigned.add(node["Name"]["Value"])
        elif kind == "ParamExp":
            self.used.add(node["Param"]["Value"])
        elif kind in ARITHMETIC:
            if node.get("Op") in ASSIGNING:
                self.assigned.add(literal(node["X"]))
            names = (literal(node[side]) for side in ("X", "Y") if side in node)
            self.used |= {name for name in names if NAME.fullmatch(name)}


def nodes(tree) -> Iterator[dict]:
    """All nodes of a syntax tree but those of functions within."""
    if isinstance(tree, list):
        for child in tree:
            yield from nodes(child)
    elif isinstance(tree, dict):
        yield tree
        for child in tree.values():
            yield from nodes(child)


def literal(word: dict) -> str:
    """The text of a word; of what is expanded in it, nothing."""
    if "Value" in word and isinstance(word["Value"], str):
        return word["Value"]
    return "".join(literal(part) for part in word.get("Parts") or [])


def functions(path: Path) -> list[Function]:
    tree = json.loads(lint("shfmt", "--to-json", stdin=path.read_text()))
    return [Function(path, node) for node in nodes(tree) if node.get("Type") == "FuncDecl"]


@every_script
def test_a_function_says_which_names_it_sets_for_others(path):
    """``export`` needs no word more: it is there to set what every command gets."""
    for function in functions(path):
        others = function.assigned - function.declared
        assert others <= function.said, f"{function.where}: write '# Sets: NAMES' above it"
        assert others == function.said or function.reads_a_file, f"{function.where} sets fewer"


@every_script
def test_a_name_in_small_letters_belongs_to_the_function_that_uses_it(path):
    """Bash lets a function see, and change, the local names of whoever called it."""
    for function in functions(path):
        small = {name for name in function.used | function.assigned if re.match("[a-z]", name)}
        assert small <= function.declared, function.where


@every_script
def test_no_line_is_longer_than_a_screen_is_wide(path):
    lines = enumerate(path.read_text().splitlines(), start=1)
    assert not [number for number, line in lines if len(line) > LONGEST_LINE], path.name


def test_these_rules_see_what_they_forbid(tmp_path):
    path = tmp_path / "bad.sh"
    path.write_text(
        "# Sets: SAID STALE\n"
        "f() {\n"
        '  local own=1 && SAID=2 other="$(g)" && own+=3 && ((number++))\n'
        "  for each in 1; do read -r line; done\n"
        "  printf -v text x\n"
        "  NOT_SET=1 command\n"
        "  trap 'TRAPPED=yes' EXIT\n"
        "  export LOUD=1\n"
        "}\n"
        'g() { echo "${own%x}$UPPER$((count + 1))"; }\n'
    )
    f, g = functions(path)
    assert f.assigned - f.declared == {
        "SAID", "other", "number", "each", "line", "text", "TRAPPED",
    }  # fmt: skip
    assert (f.declared, f.said) == ({"own"}, {"SAID", "STALE"})
    assert (g.used, g.said) == ({"own", "UPPER", "count"}, set())


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("shell", [BASH, "sh"])  # sh: another shell on many systems
def test_help_is_the_header_of_the_script(script, shell):
    result = subprocess.run(
        [shell, tiny.ROOT / script, "--help"], capture_output=True, text=True, cwd="/", timeout=20
    )
    assert result.returncode == 0
    assert result.stderr == ""
    header = re.match(r"#!.*\n#\n((?:#.*\n)+)\n", (tiny.ROOT / script).read_text())[1]
    assert result.stdout.strip() == re.sub(r"^# ?", "", header, flags=re.MULTILINE).strip()
    assert f"Usage: bash {script}" in result.stdout


@pytest.mark.parametrize(
    "script", ["setup.sh", "download_data_model.sh", "submit.sh", "monitor.sh"]
)
def test_an_option_that_is_not_known_is_refused_with_the_way_to_the_help(site, script):
    line = complaint(site.run(script, "--nonsense"), 2, script)
    assert "--nonsense is not an option" in line
    assert "--help" in line


def test_shellcheck_finds_nothing():
    lint("shellcheck", "--external-sources", *scripts())


def test_shfmt_would_change_nothing():
    lint("shfmt", "-i", "2", "-ci", "-d", *scripts())


def test_bash_parses_every_script():
    for path in scripts():
        lint("bash", "-n", path)


def test_ruff_finds_nothing_and_would_format_nothing():
    lint("ruff", "check", "--no-cache", ".")
    lint("ruff", "format", "--no-cache", "--check", ".")
