"""What the documents say is so: links, commands, settings, tests, the file tree."""

import re
import subprocess

import pytest
import yaml

import tiny
from trainstack.config import all_keys
from trainstack.runfolder import EXIT_CODES

ROOT = tiny.ROOT
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "doc").glob("*.md"))]
README = (ROOT / "README.md").read_text()


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
    for file, name in re.findall(r"(tests/\w+\.py)::(\w+)", document.read_text()):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_the_file_tree_of_the_readme_is_the_repository():
    tree = README.split("## The files")[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line[:1].strip()}
    modules = {line.split()[0] for line in tree.splitlines() if line.startswith("  ")}
    # benchmarks/ will be named when it holds something.
    hidden_or_made = {"env.sh", "README.md", "benchmarks", "__pycache__"}
    there = {p.name for p in ROOT.iterdir() if p.name[0] != "."} - hidden_or_made
    assert named == there
    assert modules == {p.name for p in (ROOT / "trainstack").glob("*.py")} - {"__init__.py"}


def test_the_table_of_exit_codes_is_that_of_the_code():
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", README, re.MULTILINE)
    assert {state: int(code) for code, state in rows} == EXIT_CODES


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_is_a_valid_configuration(recipe):
    tiny.run_module("trainstack.config", "--config", recipe)


def test_every_setting_of_config_yaml_has_a_comment_and_none_is_missing():
    text = (ROOT / "config.yaml").read_text()
    values = yaml.safe_load(text)
    assert {f"{s}.{k}" for s, keys in values.items() for k in keys} == set(all_keys())
    for line in text.splitlines():
        if line.startswith("  "):
            assert "  # " in line, line
