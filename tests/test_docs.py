"""What the documents say is so: links, commands, settings, tests, the file tree."""

import re
import subprocess

import pytest
import yaml

import tiny
from trainstack.config.load import load
from trainstack.config.problems import all_keys
from trainstack.errors import USAGE_ERROR
from trainstack.run.states import EXIT_CODES

ROOT = tiny.ROOT
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "doc").glob("*.md"))]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "doc" / "architecture.md").read_text()
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


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
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text()):
        assert target.startswith("http") or (document.parent / target).exists(), target


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
    for file, name in re.findall(r"(tests/\w+\.py)(?:::(\w+))?", document.read_text()):
        assert f"def {name}(" in (ROOT / file).read_text() or not name, f"{file}::{name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_option_of_train_by_hand_exists(document):
    source = (ROOT / "train.py").read_text()
    for options in re.findall(r"train\.py(( --?[\w.=-]+| [\w./]+)*)", document.read_text()):
        for option in re.findall(r"--[a-z-]+", options[0]):
            assert f'"{option}"' in source, option


def test_the_file_tree_of_the_readme_is_the_repository():
    lines = README.split("## The files")[1].split("```")[1].strip().splitlines()
    named = {line.split()[0] for line in lines if line[0] != " "}
    modules = {line.split()[0] for line in lines if line[0] == " "}
    paths = [name.split("/") for name in project_files() if name != "README.md"]
    assert named == {path[0] + "/" * (len(path) > 1) for path in paths}
    assert modules == {path[1] for path in paths if path[0] == "trainstack"} - {"__init__.py"}
    assert not [line for line in lines if len(line.split()) > 9], "a name and eight words at most"


def test_the_table_of_modules_is_the_package():
    named = re.findall(r"^\| \[(\w+)\]\(../trainstack/(\w+)\.py\) \|", ARCHITECTURE, re.MULTILINE)
    assert all(name == file for name, file in named)
    there = {path.stem for path in (ROOT / "trainstack").glob("*.py")} - {"__init__"}
    assert sorted(name for name, _ in named) == sorted(there)


def test_the_table_of_exit_codes_is_that_of_the_code():
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]*) ?\|", README, re.MULTILINE)
    assert {state: int(code) for code, state in rows} == {**EXIT_CODES, "": USAGE_ERROR}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_a_valid_configuration(recipe):
    """Its schedule too, which only torch and transformers can judge."""
    from trainstack.optim.schedule import build_schedule

    tiny.run_command("config", "--config", recipe)
    config = load(recipe, [])
    build_schedule(config.optim, config.train.max_steps or 1)
    assert config.run.name == recipe.stem
    assert f"--config recipes/{recipe.name}" in recipe.read_text(), "it says how it is used"


def test_every_setting_of_config_yaml_has_a_comment_and_none_is_missing():
    text = (ROOT / "config.yaml").read_text()
    values = yaml.safe_load(text)
    assert {f"{s}.{k}" for s, keys in values.items() for k in keys} == set(all_keys())
    for line in text.splitlines():
        if line.startswith("  "):
            assert "  # " in line, line
