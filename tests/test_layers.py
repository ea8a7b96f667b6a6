"""The rules that keep the code small to think about: imports point down, Slurm stays in shell."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "trainstack"
ROOMS = (  # packages, and single files, of trainstack; each imports only those before it
    "errors", "options", "processes", "units", "waits", "storage", "distributed", "config",
    "checkpoint", "run", "chat", "data", "records", "prepare", "hub", "optim", "adapter", "model",
    "evaluation", "resilience", "plan", "train", "job", "history", "monitor", "report", "trackers",
    "export",
)  # fmt: skip
ABOVE = ("__init__", "__main__")  # of the package itself: nothing imports them
BEYOND_TRAINING = (
    "records",
    "prepare",
    "hub",
    "job",
    "history",
    "monitor",
    "report",
    "trackers",
    "export",
)  # which train.py and its room do without
LIGHT = (  # what a login node runs
    "__main__", "config.command", "hub.fetch", "hub.choose", "hub.data_files", "hub.local",
    "hub.commit", "job.attempts", "job.blame", "job.submit", "model.proof", "history.goodput",
    "history.ledger", "monitor.screen", "plan.command", "report.page", "export.command", "hub.push",
    "trackers.command", "trackers.feed",
)  # fmt: skip
READ_THE_ENVIRONMENT = {  # commands, and what speaks with torchrun
    "__main__.py", "options.py", "distributed.py", "data/report.py", "evaluation/command.py",
    "hub/fetch.py", "job/launch.py", "job/submit.py", "model/proof.py", "plan/facts.py",
    "prepare/prepare.py", "prepare/tokenise.py", "trackers/command.py",
}  # fmt: skip
SLURM_COMMANDS = {"sbatch", "srun", "salloc", "scancel", "scontrol", "squeue", "sacct", "sinfo"}
RANK_NAMES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}  # torchrun's
UNPICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
MOST_FILES = 10  # of a folder: what a reader takes in at once
LONGEST_FILE = 340  # lines; 300 is the aim
LONGEST_ENTRY = 385  # of train.py, which imports what it is the table of contents of
LONGEST_FUNCTION = 45  # lines; 40 is the aim

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = [ROOT / "train.py", *MODULES]
every_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: name_of(path))
every_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: name_of(path))


def name_of(path: Path) -> str:
    """Its name below trainstack/, such as config/load.py; train.py stays itself."""
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else path.name


def room_of(path: Path) -> str:
    """The room that a file is in; a single file of the package is its own."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def ours(path: Path) -> set[Path]:
    """The files of trainstack that a file imports."""
    files = {name.removeprefix("trainstack.").replace(".", "/") + ".py" for name in imports(path)}
    return {PACKAGE / name for name in files if (PACKAGE / name).is_file()}


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


def test_every_room_has_its_place_in_the_order():
    assert {room_of(path) for path in MODULES} == {*ROOMS, *ABOVE}


@every_module
def test_a_room_imports_only_rooms_before_it(path):
    if room_of(path) in ABOVE:
        assert {room_of(target) for target in ours(path)} <= {"errors", "processes"}
        return
    allowed = {*ROOMS[: ROOMS.index(room_of(path)) + 1]}
    assert {room_of(target) for target in ours(path)} <= allowed


def test_no_file_imports_itself_by_way_of_others():
    below = {path: ours(path) for path in MODULES}
    while below:  # take away what imports nothing that is left
        free = {path for path, targets in below.items() if not targets & below.keys()}
        assert free, f"a circle among {sorted(map(name_of, below))}"
        below = {path: targets for path, targets in below.items() if path not in free}


def test_training_needs_no_room_of_what_comes_before_the_queue_or_looks_at_it():
    training = [ROOT / "train.py", *(PACKAGE / "train").glob("*.py")]
    used = {room_of(target) for path in training for target in ours(path)}
    assert not used & {*BEYOND_TRAINING}


@every_source
def test_what_is_shared_is_no_secret(path):
    """A name that begins with _ is its own file's."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainstack"):
            assert not [a.name for a in node.names if re.match("_[^_]", a.name)], node.lineno


@every_source
def test_a_function_gets_arguments_and_not_those_of_a_command_line(path):
    """But for train.py's main, which is the command line's other half."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef) and name_of(path) != "train.py":
            annotations = [a.annotation for a in node.args.args + node.args.kwonlyargs]
            said = [ast.unparse(annotation) for annotation in annotations if annotation]
            assert "argparse.Namespace" not in said, f"{name_of(path)}: {node.name}"


@pytest.mark.parametrize("name", LIGHT)
def test_what_runs_on_a_login_node_loads_neither_torch_nor_transformers(name):
    assert not loaded_by(f"import trainstack.{name}") & {"torch", "transformers"}


def test_training_loads_neither_datasets_nor_another_trainer():
    """transformers loads accelerate by itself, since peft brings it; nothing of ours uses it."""
    loaded = loaded_by("import train")
    assert "torch" in loaded
    assert not loaded & {"datasets", "peft", "trl", "lightning", "transformers.trainer"}
    assert not [path for path in SOURCES if "accelerate" in imports(path)]


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
    assert not found or name_of(path) == "distributed.py"


@every_module
def test_only_commands_and_distributed_read_the_environment(path):
    found = [n for n in ast.walk(tree(path)) if isinstance(n, ast.Attribute)]
    reads = [n.lineno for n in found if n.attr in ("environ", "getenv")]
    assert bool(reads) == (name_of(path) in READ_THE_ENVIRONMENT), reads


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


def test_what_a_browser_gets_is_short_too():
    """But for uPlot, which is another's, and unchanged."""
    for path in [path for kind in ("html", "css", "js") for path in PACKAGE.glob(f"*/*.{kind}")]:
        lines = path.read_text().splitlines()
        assert len(lines) <= LONGEST_FILE, path.name
        assert not [n for n, line in enumerate(lines, start=1) if len(line) > 100], path.name


def test_folders_files_and_functions_stay_short():
    too_long = []
    for folder in (PACKAGE, *(path for path in PACKAGE.iterdir() if path.is_dir())):
        if len(list(folder.glob("*.py"))) > MOST_FILES:
            too_long.append(f"{folder.name}/ has more than {MOST_FILES} files")
    for path in SOURCES:
        lines = len(path.read_text().splitlines())
        if lines > (LONGEST_ENTRY if path.name == "train.py" else LONGEST_FILE):
            too_long.append(f"{name_of(path)} has {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    too_long.append(f"{name_of(path)}:{node.lineno} {node.name} has {lines} lines")
    assert not too_long
