"""The rules that keep the code small to think about: imports point down, Slurm stays in shell."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOUNDATIONS = (  # each imports those before
    "processes", "files", "tensorfile", "places", "foreign", "errors", "strict_yaml", "sections",
    "config", "distributed",
)  # fmt: skip
COMPONENTS = {
    "chat", "checkpoint", "data", "demo", "documents", "environment", "fault", "formats", "guard",
    "history", "interval", "metrics", "model", "optim", "packing", "runfolder", "stop", "tokens",
    "training", "watchdog",
}  # fmt: skip
PARTS = {  # of an entry point, which alone imports them
    "hub": {"hub_choose", "hub_local", "hub_verify"},
    "prepare": {"prepare_tokens", "prepare_writer"},
}
ALL_PARTS = {part for parts in PARTS.values() for part in parts}
TRAIN_PARTS = ("startup", "report", "failure")  # of train.py; each imports those before
ENTRY_POINTS = {
    "__main__", "data_report", "goodput", "hub", "job", "launch", "ledger", "monitor", "prepare",
    "submit",
}  # fmt: skip
LIGHT = (
    "__main__",
    "config",
    "goodput",
    "hub",
    *sorted(PARTS["hub"]),
    "job",
    "monitor",
    "submit",
)  # for login nodes
SLURM_COMMANDS = {"sbatch", "srun", "salloc", "scancel", "scontrol", "squeue", "sacct", "sinfo"}
RANK_NAMES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}  # torchrun's
UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
LONGEST_FILE = 430  # lines; 300 is the aim, config.py, train.py and checkpoint.py are beyond it
LONGEST_FUNCTION = 50  # lines; 40 is the aim

PACKAGE = {path.stem: path for path in sorted((ROOT / "trainstack").glob("*.py"))}
MODULES = {name: path for name, path in PACKAGE.items() if name != "__init__"}
SOURCES = [ROOT / "train.py", *PACKAGE.values()]
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), path.name)


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, at its top or within a function."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: write the whole name of a module"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def ours(path: Path) -> set[str]:
    """The modules of trainstack that a file imports."""
    words = [name.split(".") for name in imports(path)]
    return {word[1] for word in words if word[0] == "trainstack" and len(word) > 1} & {*MODULES}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the dotted name of what is called, such as subprocess.run."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def texts(node: ast.AST) -> list[str]:
    """The string constants below a node."""
    constants = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    return [value for value in constants if isinstance(value, str)]


def keyword(call: ast.Call, name: str) -> str:
    """A keyword argument as it is written; an empty text where it is not given."""
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), "")


def loaded_by(*statements: str) -> set[str]:
    """The modules that a fresh Python has loaded after some statements."""
    code = "\n".join([*statements, "import sys", "print(*sys.modules)"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_every_module_has_its_layer():
    assert {*MODULES} == {*FOUNDATIONS, *TRAIN_PARTS} | COMPONENTS | ALL_PARTS | ENTRY_POINTS


@pytest.mark.parametrize("name", FOUNDATIONS)
def test_a_foundation_imports_only_foundations_below_it(name):
    assert ours(MODULES[name]) <= {*FOUNDATIONS[: FOUNDATIONS.index(name)]}


@pytest.mark.parametrize("name", sorted(COMPONENTS))
def test_a_component_imports_only_foundations(name):
    assert ours(MODULES[name]) <= {*FOUNDATIONS}


@pytest.mark.parametrize("name", sorted(ENTRY_POINTS | ALL_PARTS))
def test_an_entry_point_imports_no_other_entry_point_nor_its_parts(name):
    parts = PARTS.get(name.partition("_")[0], set())
    assert ours(MODULES[name]) <= {*FOUNDATIONS} | COMPONENTS | parts


def test_train_imports_no_other_entry_point():
    assert ours(ROOT / "train.py") <= {*FOUNDATIONS, *TRAIN_PARTS} | COMPONENTS


@pytest.mark.parametrize("name", TRAIN_PARTS)
def test_a_part_of_train_imports_only_parts_before_it(name):
    parts = {*TRAIN_PARTS[: TRAIN_PARTS.index(name)]}
    assert ours(MODULES[name]) <= {*FOUNDATIONS} | COMPONENTS | parts


@pytest.mark.parametrize("name", LIGHT)
def test_what_runs_on_a_login_node_loads_neither_torch_nor_transformers(name):
    assert not loaded_by(f"import trainstack.{name}") & {"torch", "transformers"}


def test_training_loads_neither_datasets_nor_another_trainer():
    loaded = loaded_by("import train")
    assert "torch" in loaded
    assert not loaded & {"datasets", "accelerate", "trl", "lightning", "transformers.trainer"}


@every_source
def test_python_does_not_know_slurms_variables(path):
    found = re.findall(r".*SLURM_.*", path.read_text())
    assert not found, f"{path.name}: the shell hands over what is needed, as an argument"


@every_source
def test_python_runs_no_slurm_command(path):
    starters = re.compile(r"(asyncio\.)?subprocess\.\w+|os\.(system|popen|exec\w+|spawn\w+)")
    words = [text for name, call in calls(path) if starters.fullmatch(name) for text in texts(call)]
    for node in ast.walk(tree(path)):  # a command that is built before it is run
        if isinstance(node, ast.List | ast.Tuple) and node.elts:
            words += texts(node.elts[0])
    programs = {Path(text.split()[0]).name for text in words if text.split()}
    assert not programs & SLURM_COMMANDS


@every_source
def test_only_distributed_reads_the_ranks(path):
    found = RANK_NAMES & {*texts(tree(path))}
    assert not found or path.name == "distributed.py"


@pytest.mark.parametrize("name", sorted(COMPONENTS))
def test_a_component_gets_arguments_and_reads_no_environment(name):
    found = [n for n in ast.walk(tree(MODULES[name])) if isinstance(n, ast.Attribute)]
    assert not [n.lineno for n in found if n.attr in ("environ", "getenv")]


@every_source
def test_nothing_that_is_loaded_can_run_code(path):
    assert not {name.split(".")[0] for name in imports(path)} & UNPICKLERS
    for name, call in calls(path):
        place = f"{path.name}:{call.lineno}: {name}"
        assert name not in ("eval", "exec"), place
        assert not re.fullmatch(r"yaml\.(unsafe_|full_)?load(_all)?", name), place
        assert keyword(call, "Loader") in ("", "yaml.BaseLoader", "yaml.SafeLoader"), place
        assert name != "torch.load" or keyword(call, "weights_only") == "True", place
        assert keyword(call, "allow_pickle") in ("", "False"), place
        assert keyword(call, "trust_remote_code") in ("", "False"), place


def test_no_script_evaluates_text():
    scripts = [*ROOT.glob("*.sh"), *ROOT.glob("*.slurm"), *ROOT.glob("tests/*.sh")]
    assert scripts
    for path in scripts:
        code = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        assert not [line for line in code if re.search(r"\beval\b", line)], path.name


def test_files_and_functions_stay_short():
    too_long = []
    for path in SOURCES:
        lines = len(path.read_text().splitlines())
        if lines > LONGEST_FILE:
            too_long.append(f"{path.name} has {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    too_long.append(f"{path.name}:{node.lineno} {node.name} has {lines} lines")
    assert not too_long
