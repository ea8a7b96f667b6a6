"""What the documents say is so, and short: links, commands, settings, tests, files, sentences."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import matrix_table
import pytest
import test_layers
import yaml

import tiny
from trainstack import waits
from trainstack.config.load import load
from trainstack.config.problems import all_keys
from trainstack.config.schedules import SCHEDULES, settings_of
from trainstack.data.order import Mixture
from trainstack.errors import USAGE_ERROR
from trainstack.optim.schedule import describe_schedule
from trainstack.run.states import EXIT_CODES

ROOT = tiny.ROOT
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "doc").glob("*.md"))]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "doc" / "architecture.md").read_text()
PROTOCOLS = (ROOT / "doc" / "protocols.md").read_text()
DATA = (ROOT / "doc" / "data.md").read_text()
OVERVIEW = (ROOT / "doc" / "overview.md").read_text()
MATRIX = (ROOT / "doc" / "fault-matrix.md").read_text()
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TOP = ROOT / "trainstack" / "__init__.py"
ROOMS = sorted((ROOT / "trainstack").glob("*/__init__.py"))
LONGEST_SENTENCE = 40  # words
LONGEST_LINE = 100  # columns


def project_files() -> list[str]:
    """The paths that belong to the project: by git; without it, all but what is made here."""
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        names = done.stdout.strip("\0").split("\0")
    except (OSError, subprocess.CalledProcessError):
        paths = [path for path in ROOT.rglob("*") if "__pycache__" not in path.parts]
        names = [str(path.relative_to(ROOT)) for path in paths if path.name != "env.sh"]
    return [name for name in names if name[0] != "." and (ROOT / name).is_file()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document):
    """Also to its section, by the name that GitHub gives it."""
    for target, part in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", document.read_text()):
        path = document.parent / (target or document.name)
        assert target.startswith("http") or path.exists(), target
        if part and not target.startswith("http"):
            titles = re.findall(r"(?m)^#+ (.*)$", path.read_text())
            names = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert part in names, f"{target}#{part}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_and_every_option_exists(document):
    for script, rest in re.findall(r"bash ([\w./]+\.sh)([^`#\n|]*)", document.read_text()):
        path = ROOT / script
        assert path.exists(), script
        shown = subprocess.run(["bash", path, "--help"], capture_output=True, text=True).stdout
        for option in re.findall(r"(?<!\S)--[a-z][a-z-]+", rest.split(" -- ")[0]):
            assert option in shown, f"{script} {option}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_setting_that_is_named_exists(document):
    sections = {key.split(".")[0] for key in all_keys()}
    files = re.compile(r"\.(py|sh|md|yaml|json|jsonl|slurm|txt|bin|out|safetensors)$")
    for word in re.findall(r"(?<![\w./])([a-z]+\.[a-z_]+)\b", document.read_text()):
        if word.split(".")[0] in sections and not files.search(word):
            assert word in all_keys(), word


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_is_named_exists(document):
    for file, name in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", document.read_text()):
        assert f"def {name}(" in (ROOT / file).read_text() or not name, f"{file}::{name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_of_train_by_hand_exists(document):
    source = (ROOT / "train.py").read_text()
    for options in re.findall(r"train\.py(( --?[\w.=-]+| [\w./]+)*)", document.read_text()):
        for option in re.findall(r"--[a-z-]+", options[0]):
            assert f'"{option}"' in source, option


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_the_package_exists(document):
    names = re.findall(r"-m trainstack([ .]\w+)", document.read_text())
    if names:
        commands = (ROOT / "trainstack" / "__main__.py").read_text()
        assert not [name for name in names if f'"{name[1:]}"' not in commands]
        assert not [name for name in names if name[0] == "."], "write: -m trainstack NAME"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_sentence_is_long(document):
    too_long = [text for text in sentences(document) if len(text.split()) > LONGEST_SENTENCE]
    assert not too_long


def sentences(document: Path) -> Iterator[str]:
    """Sentences, items of lists and cells of tables; without code blocks, `code` as one word."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", document.read_text())
    text = re.sub(r"`[^`]+`", "code", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)  # of a link, what is read
    text = re.sub(r"(?m)^ *(-|\d+\.) |^\||\|$|\| | \|", "\n\n", text)
    for block in re.split(r"\n\s*\n", text):
        yield from re.split(r"(?<=[.?!])\)?\s+", block)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_line_is_long_but_a_row_of_a_table_in_doc(document):
    is_readme = document.name == "README.md"
    for number, line in enumerate(document.read_text().splitlines(), start=1):
        is_free = line.startswith("|") and not is_readme
        assert is_free or len(line) <= LONGEST_LINE, f"{document.name}:{number}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_each_row_of_a_table_has_as_many_cells_as_its_head(document):
    """A bar within code ends a cell too, unless it is written with a backslash."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", document.read_text())
    for table in re.findall(r"(?m)(?:^\|.*\n)+", text):
        bars = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert len({*bars}) == 1, table.splitlines()[0]


def test_the_file_list_of_the_readme_is_the_repository_and_the_rooms_of_the_package():
    lines = README.split("## The files")[1].split("```")[1].strip().splitlines()
    top = [line.split()[0] for line in lines if line[0] != " "]
    rooms = [line.split()[0] for line in lines if line[0] == " "]
    paths = [name.split("/") for name in project_files() if name != "README.md"]
    files = {path[0] for path in paths if len(path) == 1}
    folders = {f"{path[0]}/" for path in paths if len(path) > 1}
    assert sorted(top) == sorted(files | folders)
    assert sorted(rooms) == [f"{path.parent.name}/" for path in ROOMS]
    assert not [line for line in lines if len(line.split()) > 9], "a name and eight words at most"


@pytest.mark.parametrize("path", [TOP, *ROOMS], ids=lambda path: path.parent.name)
def test_the_docstring_of_a_package_lists_its_files_in_one_line_each(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    listed = re.findall(r"(?m)^ *(\w+\.py)  +\S", docstring)
    assert sorted(listed) == sorted(file.name for file in path.parent.glob("*.py") if file != path)


def test_the_order_of_the_rooms_is_the_order_of_imports():
    shown = re.findall(r"(?m)^\| `(\w+)` \|", section(ARCHITECTURE, "Rooms"))
    assert tuple(shown) == test_layers.ROOMS


def section(text: str, title: str) -> str:
    """What is below a heading, to the next one of its kind."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_table_of_waits_is_that_of_the_code():
    shown = re.findall(r"(?m)^\| `([A-Z_]+)` \| ([\d.]+) \|", section(PROTOCOLS, "Waits"))
    values = {name: float(value) for name, value in vars(waits).items() if name.isupper()}
    assert {name: float(seconds) for name, seconds in shown} == values
    assert [name for name, _ in shown] == [*values], "in the order of waits.py"


def test_the_table_of_schedules_is_that_of_the_code():
    text = section(OVERVIEW, "The learning rate")
    rows = re.findall(r"(?m)^\| `(\w+)` \|[^|]*\| (.*) \|$", text)
    taken = {name: re.findall(r"\w+", cell.replace("nothing", "")) for name, cell in rows}
    assert taken == {name: [*settings_of(name).model_fields] for name in SCHEDULES}


def test_the_mixture_that_is_worked_through_is_what_the_code_draws():
    blocks = re.findall(r"(?m)^\| (\d+) \| (\d+) \| (\d+) \|", section(DATA, "Mixing"))
    assert blocks
    mixture = Mixture([1000, 1000], [0.7, 0.3], seed=1)
    for block, first, second in [map(int, row) for row in blocks]:
        drawn = mixture.drawn_before(block + 1) - mixture.drawn_before(block)
        assert drawn.tolist() == [first, second], f"block {block}"


def test_the_page_of_the_fault_matrix_is_what_the_script_writes():
    """Its rows and the line that says how they were measured are the measurement's."""
    written = matrix_table.page([], "Measured on another day.")
    is_measured = re.compile(r"\| F\d\d[^|]*\|(?: [^|]*\|){8}|Measured on .*")
    shown = [line for line in MATRIX.splitlines() if not is_measured.fullmatch(line)]
    assert shown == [line for line in written.splitlines() if not is_measured.fullmatch(line)]


def test_the_page_of_all_settings_is_what_the_script_writes(tmp_path):
    command = [sys.executable, ROOT / "doc" / "configuration.py", tmp_path / "configuration.md"]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": "."})
    written = (tmp_path / "configuration.md").read_text()
    assert (ROOT / "doc" / "configuration.md").read_text() == written, "write it again, as it says"
    assert re.findall(r"(?m)^\| `([a-z]+\.\w+)`", written) == all_keys()


def test_the_pictures_are_drawn_from_what_runs_and_benchmarks_leave(tmp_path):
    """A bar twice as long for half of the time; a curve, a restart, what was done twice."""
    taken = {"step": {"tiny": {"bare": [1.0, 1.2, 1.4], "ours": [0.6, 0.6, 0.7]}}}
    (tmp_path / "results.json").write_text(json.dumps(taken))
    bars = {bar.get("class"): float(bar.get("width")) for bar in drawn("speed_bars", tmp_path,
            tmp_path / "results.json").iterfind("{*}rect")}  # fmt: skip
    assert bars["ours"] == pytest.approx(2 * bars["bare"], abs=0.2)
    metrics = [{"step": step, "loss": 9.0 - step} for step in range(1, 6)]
    events = [{"event": "failed", "step": 4, "cause": "rank 1 on a: killed by SIGKILL"},
              {"event": "training", "step": 2}]  # fmt: skip
    for name, records in (("metrics", metrics), ("events", events)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    picture = drawn("loss_curve", tmp_path, tmp_path)
    assert len(picture.find("{*}polyline").get("points").split()) == 5
    assert "rank 1 killed by SIGKILL" in [text.text for text in picture.iterfind("{*}text")]


def drawn(script: str, folder: Path, source: Path) -> ElementTree.Element:
    command = [sys.executable, ROOT / "doc" / f"{script}.py", source, folder / "picture.svg"]
    subprocess.run(command, check=True, capture_output=True)
    return ElementTree.fromstring((folder / "picture.svg").read_text())


def test_each_word_for_the_health_of_a_run_is_explained():
    source = (ROOT / "trainstack" / "monitor" / "health.py").read_text()
    head = (ROOT / "doc" / "troubleshooting.md").read_text().split("\n## ")[0]
    shown = re.findall(r"\*([a-z]+)\*", head)
    for cell in re.findall(r"(?m)^\| ([a-z, ]+) \|", head)[1:]:  # not the head of the table
        shown += cell.split(", ")
    assert all(f'"{word}"' in source for word in shown), shown
    assert {*re.findall(r'Health\(\s*"(\w+)"', source)} <= {*shown}


def test_the_table_of_exit_codes_is_that_of_the_code():
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]*) ?\|", README, re.MULTILINE)
    assert {state: int(code) for code, state in rows} == {**EXIT_CODES, "": USAGE_ERROR}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_a_valid_configuration(recipe):
    """Its schedule too."""
    tiny.run_command("config", "--config", recipe)
    config = load(recipe, [])
    describe_schedule(config.optim, config.train.max_steps or 1)
    assert config.run.name == recipe.stem
    assert f"--config recipes/{recipe.name}" in recipe.read_text(), "it says how it is used"


def test_every_setting_of_config_yaml_has_a_comment_and_none_is_missing():
    text = (ROOT / "config.yaml").read_text()
    values = yaml.safe_load(text)
    assert {f"{s}.{k}" for s, keys in values.items() for k in keys} == set(all_keys())
    for line in text.splitlines():
        if line.startswith("  "):
            assert "  # " in line, line
