"""download_data_model.sh and trainstack.hub against a Hub of this machine that misbehaves."""

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import namedtuple
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from hub_server import HubServer
from trainstack.errors import ConfigError
from trainstack.hub import data_files
from trainstack.hub.asset import Asset
from trainstack.hub.fetch import main
from trainstack.job.inputs import asset_problem
from trainstack.records.readers import read_chunks, split_files
from trainstack.storage import files, layout
from trainstack.storage.manifest import TRUSTED_BY_SIZE, damage, hash_file, read_manifest

PROJECT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "Q7w9" * 8
PRETRAINED = ["model.name=org/tiny", "model.init=pretrained"]
Result = namedtuple("Result", "code lines errors")


@pytest.fixture(scope="session")
def tokenizer_json():
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["one two three four"] * 4, trainer)
    return tokenizer.to_str()


def write_model(folder: Path, tokenizer_json: str, value: float = 0.0) -> Path:
    """A Llama of 300 tokens as save_pretrained leaves it, and files that nobody should fetch."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer_json)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    weights = {"a": np.full((100, 200), value, np.float32), "b": np.zeros(7, np.float16)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "README.md").write_text("A model.")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"another layout")
    return folder


def write_data(folder: Path) -> Path:
    """A data set of two subsets; the second has the splits train and test."""
    for name in ("large/train-0.jsonl", "small/train-0.jsonl", "small/test-0.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(f'{{"text": "{name} one {i}"}}\n' for i in range(50)))
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        '- config_name: large\n  data_files: "large/*.jsonl"\n'
        "- config_name: small\n  data_files:\n"
        "  - split: train\n    path: small/train-*\n  - split: test\n    path: small/test-*\n"
        "---\nA data set.\n"
    )
    return folder


@pytest.fixture
def server(tmp_path, tokenizer_json):
    write_model(tmp_path / "root/models/org/tiny", tokenizer_json)
    with HubServer(tmp_path / "root") as server:
        yield server


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def fetch(tmp_path, home, server):
    """Call ``python -m trainstack hub`` to its end; the command is ``fetch.command``."""
    common = ["--home", str(home), "--retry-delay", "0.05"]
    command = [sys.executable, "-m", "trainstack", "hub", *common]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server.url, "HOME": str(tmp_path), "PYTHONPATH": str(PROJECT)}

    def run(*arguments: str, umask: int = -1, patch: str = "", **variables: str) -> Result:
        call = "import sys; from trainstack.hub.fetch import main; sys.exit(main(sys.argv[1:]))"
        done = subprocess.run(
            [
                *([sys.executable, "-c", f"{patch}; {call}", *common] if patch else command),
                "--config",
                str(PROJECT / "config.yaml"),
                *arguments,
            ],
            capture_output=True,
            text=True,
            env={**environment, **variables},
            cwd=tmp_path,
            umask=umask,
        )
        lines = done.stderr.splitlines()
        assert all(line.startswith("hub: ") for line in lines), done.stderr
        assert done.stdout == ""
        return Result(done.returncode, lines, [line for line in lines if "error:" in line])

    run.command, run.environment = command, environment
    return run


@pytest.fixture
def call(tmp_path, home, monkeypatch, capsys):
    """The same in this process, quicker; only for what never imports the library of the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run(*arguments: str) -> Result:
        config = str(PROJECT / "config.yaml")
        code = main(["--home", str(home), "--config", config, *arguments])
        lines = capsys.readouterr().err.splitlines()
        return Result(code, lines, [line for line in lines if "error:" in line])

    return run


def repository(server, kind="models", name="org/tiny") -> Path:
    return server.root / kind / name


def visible(home: Path) -> list[str]:
    """Everything below home but the caches."""
    paths = [path.relative_to(home) for path in home.rglob("*") if not path.is_dir()]
    return sorted(str(path) for path in paths if path.parts[0] != "cache")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# What arrives


def test_a_model_arrives_whole_verified_and_without_what_is_not_loaded(server, home, fetch):
    assert fetch(*PRETRAINED).code == 0
    folder = home / "models/org/tiny"
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert visible(home) == sorted(f"models/org/tiny/{n}" for n in [*names, "manifest.json"])
    manifest = read_manifest(folder)
    source = repository(server)
    assert manifest["files"] == {n: hash_file(source / n) for n in names}
    assert manifest["commit"] == server.find("models", "org/tiny", None)[1]
    facts = {k: manifest[k] for k in ("kind", "name", "revision", "source", "parameters")}
    assert facts == {
        "kind": "model",
        "name": "org/tiny",
        "revision": "main",
        "source": "hub",
        "parameters": 20007,
    }
    assert manifest["weight_bytes"] == (source / "model.safetensors").stat().st_size
    assert manifest["fetched_at"].endswith("+00:00")
    assert list(damage(folder)) == []


def test_only_the_subset_asked_for_arrives_with_all_its_splits(server, home, fetch):
    write_data(repository(server, "datasets", "org/text"))
    result = fetch("data.name=org/text", "data.subset=small", "data.eval_split=test")
    assert result.code == 0, result
    folder = layout.dataset_folder(home, "org/text", "small")
    manifest = read_manifest(folder)
    assert list(manifest["files"]) == ["README.md", "small/test-0.jsonl", "small/train-0.jsonl"]
    assert manifest["splits"] == {"train": ["small/train-0.jsonl"], "test": ["small/test-0.jsonl"]}
    assert (manifest["kind"], manifest["subset"]) == ("dataset", "small")
    assert list(damage(folder)) == []


def test_progress_is_one_line_before_and_one_after(fetch, server):
    lines = fetch(*PRETRAINED).lines
    commit = server.find("models", "org/tiny", None)[1][:7]
    assert lines[0].startswith("hub: model org/tiny: fetching 4 files, 8")
    assert lines[1].startswith(f"hub: model org/tiny: commit {commit}, 4 files verified, 8")
    assert len(lines) == 2


def test_a_model_that_starts_from_scratch_needs_no_weights_until_they_are_wanted(
    server, home, fetch
):
    assert fetch("model.name=org/tiny").code == 0
    assert "models/org/tiny/model.safetensors" not in visible(home)
    result = fetch(*PRETRAINED)
    assert result.code == 0 and "without its weights" in result.lines[0]
    assert "models/org/tiny/model.safetensors" in visible(home)
    assert fetch("model.name=org/tiny", "--force").code == 0
    assert "models/org/tiny/model.safetensors" in visible(home)  # another run may use them


def test_the_demo_needs_no_network(home, call):
    assert call() == Result(0, [], [])
    assert not home.exists()


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_what_the_group_may_read_is_the_umasks_decision(home, fetch, umask):
    assert fetch(*PRETRAINED, umask=umask).code == 0
    for path in home.rglob("*"):
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask, path


# The second call


def test_a_second_call_sends_no_request_and_says_what_is_here(server, home, fetch):
    write_data(repository(server, "datasets", "org/text"))
    wanted = [*PRETRAINED, "data.name=org/text", "data.subset=small"]
    assert fetch(*wanted).code == 0
    server.requests.clear()
    result = fetch(*wanted)
    commit = server.find("models", "org/tiny", None)[1][:7]
    assert result.lines[0].startswith(f"hub: model org/tiny is here (commit {commit}, 8")
    assert result.lines[1].startswith("hub: data set org/text is here (commit ")
    assert (result.code, server.requests) == (0, [])


def test_a_damaged_file_is_named_and_the_model_fetched_again(home, fetch):
    fetch(*PRETRAINED)
    victim = home / "models/org/tiny/tokenizer.json"
    victim.write_text(victim.read_text().replace("one", "eno", 1))
    result = fetch(*PRETRAINED)
    assert result.code == 0
    assert "damaged (tokenizer.json: hash differs); fetching it again" in result.lines[0]
    assert list(damage(victim.parent)) == []


def test_another_revision_replaces_the_one_that_is_here(server, home, fetch, tokenizer_json):
    write_model(repository(server, name="org/tiny@v2"), tokenizer_json, value=2.0)
    fetch(*PRETRAINED)
    result = fetch(*PRETRAINED, "model.revision=v2")
    assert result.code == 0 and "at revision main, not v2" in result.lines[0]
    manifest = read_manifest(home / "models/org/tiny")
    assert manifest["commit"] == server.find("models", "org/tiny", "v2")[1]
    server.requests.clear()
    assert fetch(*PRETRAINED, f"model.revision='{manifest['commit']}'").code == 0
    assert server.requests == []


def test_force_refresh_takes_the_new_commit_and_keeps_no_file_that_left(server, home, fetch):
    source = repository(server)
    (source / "generation_config.json").write_text("{}")
    fetch(*PRETRAINED)
    (source / "generation_config.json").unlink()
    (source / "tokenizer_config.json").write_text('{"eos_token": "<end>", "new": 1}')
    assert fetch(*PRETRAINED, "--force").code == 0
    folder = home / "models/org/tiny"
    assert sha256(folder / "tokenizer_config.json") == sha256(source / "tokenizer_config.json")
    assert not (folder / "generation_config.json").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_force_refresh_fetches_even_the_same_commit_again(server, fetch):
    fetch(*PRETRAINED)
    server.requests.clear()
    assert fetch(*PRETRAINED, "--force").code == 0
    fetched = {r.path.rpartition("/")[2] for r in server.requests if "/resolve/" in r.path}
    assert "model.safetensors" in fetched


def test_force_refresh_with_the_hub_down_leaves_the_old_copy_and_says_so(server, home, fetch):
    fetch(*PRETRAINED)
    before = {path: sha256(home / path) for path in visible(home)}
    server.close()
    result = fetch(*PRETRAINED, "--force")
    assert result.code == 1 and len(result.errors) == 1
    assert server.url in result.errors[0] and "in 5 tries" in result.errors[0]
    assert result.errors[0].endswith("stays in use")
    assert {path: sha256(home / path) for path in visible(home)} == before


def test_a_swap_that_was_killed_between_its_renames_is_undone(server, home, fetch):
    fetch(*PRETRAINED)
    folder = home / "models/org/tiny"
    folder.rename(folder.with_name(".tiny.old"))
    server.requests.clear()
    result = fetch(*PRETRAINED)
    assert (result.code, server.requests) == (0, []) and "is here" in result.lines[0]
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


# Faults that pass


PASSING_FAULTS = {
    "busy": [
        {"path": "GET /api/models/org/tiny/revision", "kind": 503},
        {"path": "GET /api/models/org/tiny/revision", "kind": 429},
        {"path": "HEAD .*/tokenizer.json", "kind": 503},
        {"path": "GET .*/model.safetensors", "kind": 503, "times": 2},
        {"path": "GET .*/model.safetensors", "kind": 429},
    ],
    "reset": [{"path": "GET .*/model.safetensors", "kind": "reset", "times": 2}],
    "cut": [{"path": "GET .*/model.safetensors", "kind": "cut"}],
    "stall": [{"path": "GET .*/model.safetensors", "kind": "stall"}],
    "no answer": [
        {"path": "GET /api/models/org/tiny/tree", "kind": "down"},
        {"path": "HEAD .*/config.json", "kind": "down"},
        {"path": "GET .*/config.json", "kind": "down"},
    ],
    "wrong bytes": [
        {"path": "GET .*/model.safetensors", "kind": "wrong_bytes"},
        {"path": "GET .*/config.json", "kind": "wrong_bytes"},
    ],
}


@pytest.mark.parametrize("fault", PASSING_FAULTS)
def test_a_fault_that_passes_is_survived(server, home, fetch, fault):
    server.faults += [{"times": 1, **rule} for rule in PASSING_FAULTS[fault]]
    result = fetch(*PRETRAINED, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert result.code == 0 and not any(rule["times"] for rule in server.faults), result
    assert list(damage(home / "models/org/tiny")) == []
    source = repository(server) / "model.safetensors"
    assert sha256(home / "models/org/tiny/model.safetensors") == sha256(source)


@pytest.mark.parametrize("path", ["GET /api/models/org/tiny/tree", "GET .*/model.safetensors"])
@pytest.mark.parametrize(
    "headers",
    [
        {"RateLimit": '"api";r=0;t=0', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'},
        {"Retry-After": "1"},
    ],
    ids=str,
)
def test_a_limit_of_the_hub_is_said_and_waited_for_as_it_asks(server, fetch, path, headers):
    server.faults.append({"path": path, "kind": 429, "headers": headers})
    started = time.monotonic()
    result = fetch(*PRETRAINED)
    assert result.code == 0, result
    (said,) = (line for line in result.lines if "429" in line)
    assert re.search(r"HTTP 429 \(too many requests\); try 2 of 5 in (1|1\.\d+) s$", said), said
    assert time.monotonic() - started > 1


def test_a_wait_may_be_asked_for_until_a_date():
    from trainstack.hub.commit import seconds_asked

    def asked(**headers) -> float:
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return seconds_asked(
            SimpleNamespace(response=SimpleNamespace(status_code=429, headers=headers))
        )

    now = time.time()
    assert 58 < asked(Retry_After=formatdate(now + 60, usegmt=True)) <= 60
    for past in (formatdate(now - 60, usegmt=True), "soon", ""):
        assert asked(Retry_After=past) == 0
    assert asked(RateLimit='"api";r=0;t=55', Retry_After="7") == 56
    assert asked(RateLimit='"api";r=9;t=55', Retry_After="7") == 7, "it is not that limit"


def test_files_side_by_side_say_a_limit_once(server, fetch):
    headers = {"RateLimit": '"resolvers";r=0;t=1'}
    server.faults.append({"path": "HEAD ", "kind": 429, "headers": headers, "times": 3})
    result = fetch(*PRETRAINED)
    assert result.code == 0 and len([n for n in result.lines if "429" in n]) <= 2, result


def test_a_limit_that_lasts_is_not_waited_for(server, home, fetch):
    headers = {"RateLimit": '"api";r=0;t=3540'}
    server.faults.append({"path": "GET .*/model.safetensors", "kind": 429, "headers": headers})
    result = fetch(*PRETRAINED)
    assert result.code == 1 and len(result.errors) == 1
    assert "asks to wait 59 min (HTTP 429" in result.errors[0]
    assert "set HF_TOKEN to your token" in result.errors[0]
    assert visible(home), "what has arrived is kept"


def test_a_damaged_file_in_the_users_own_cache_is_not_taken(server, home, fetch, tmp_path):
    fill = "import huggingface_hub as h; h.snapshot_download('org/tiny')"
    environment = {**fetch.environment, "HF_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", fill], env=environment, check=True, capture_output=True)
    (cached,) = (tmp_path / "cache/hub").glob("models--org--tiny/snapshots/*/model.safetensors")
    data = bytearray(cached.read_bytes())
    data[-1] ^= 1
    cached.resolve().write_bytes(data)
    server.requests.clear()
    assert fetch(*PRETRAINED, HF_HOME=str(tmp_path / "cache")).code == 0
    assert list(damage(home / "models/org/tiny")) == []
    source = repository(server) / "model.safetensors"
    assert sha256(home / "models/org/tiny/model.safetensors") == sha256(source)
    fetched = [r.path.rpartition("/")[2] for r in server.requests if r.method == "GET"]
    assert "model.safetensors" in fetched and "tokenizer.json" not in fetched
    assert fetch(*PRETRAINED, "--force", HF_HOME=str(tmp_path / "cache")).code == 0
    assert any(r.method == "GET" and r.path.endswith("tokenizer.json") for r in server.requests)


# Faults that stay


def refuse(server, case: str) -> tuple[list[str], dict[str, str]]:
    """Prepare a case of the next test; returns its arguments and variables."""
    source = repository(server)
    if case.startswith("gated"):
        server.gated.add("org/tiny")
        return PRETRAINED, {"HF_TOKEN": TOKEN} if case == "gated, token" else {}
    if case == "private":
        server.private.add("org/tiny")
    if case == "pickles":
        (source / "model.safetensors").unlink()
    if case == "remote code":
        (source / "config.json").write_text('{"model_type": "own", "auto_map": {"A": "own.B"}}')
    if case == "no config":
        (source / "config.json").unlink()
    if case == "no tokenizer":
        (source / "tokenizer.json").unlink()
    if case == "missing shard":
        (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
        index = {"metadata": {}, "weight_map": {"a": "model-00002-of-00002.safetensors"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    if case == "wrong bytes":
        server.faults.append({"path": "GET .*safetensors", "kind": "wrong_bytes", "times": 9})
    if case == "always 503":
        server.faults.append({"path": "GET .*safetensors", "kind": "503", "times": 99})
    if case == "no such repository":
        return ["model.name=org/none"], {}
    if case == "no such revision":
        return [*PRETRAINED, "model.revision=v9"], {}
    if case == "no name":
        return ["model.name=org/a--b"], {}
    return PRETRAINED, {"HF_HUB_OFFLINE": "1"} if case == "offline" else {}


@pytest.mark.parametrize(
    ("case", "cause", "fix"),
    [
        ("gated", "gated", ", then set HF_TOKEN to your token"),
        ("gated, token", "gated", ", with the account of your token"),
        ("private", "does not exist", "HF_TOKEN"),
        ("no such repository", "does not exist", "check model.name"),
        ("no such revision", "no revision v9", "set model.revision"),
        ("no name", "not a name on the Hub", "org/name"),
        ("pickles", "pytorch_model.bin", "model.safetensors"),
        ("remote code", "auto_map", "built in"),
        ("no config", "config.json", "name another model"),
        ("no tokenizer", "no tokenizer", "beside its config.json"),
        ("missing shard", "model-00002-of-00002.safetensors", "name another"),
        ("wrong bytes", "model.safetensors arrived twice", "another network"),
        ("always 503", "HTTP 503", "check the network"),
        ("offline", "HF_HUB_OFFLINE", "unset"),
    ],
)
def test_a_fault_that_stays_is_one_line_with_its_fix(server, home, fetch, case, cause, fix):
    arguments, variables = refuse(server, case)
    result = fetch(*arguments, **variables)
    assert result.code == 1 and len(result.errors) == 1, result
    assert cause in result.errors[0] and fix in result.errors[0]
    assert result.errors[0] == result.lines[-1]
    left = visible(home) if home.exists() else []
    if case == "always 503":  # what arrived waits for the next call, under a hidden name
        assert left and all("/.tiny." in path for path in left)
    else:
        assert left == []


@pytest.mark.parametrize("origin", ["Hub", "local"])
def test_the_index_alone_says_which_files_have_the_weights(server, home, fetch, origin):
    source = repository(server)
    shard = "layers/model.safetensors-00001-of-00001.safetensors"
    (source / "layers").mkdir()
    (source / "model.safetensors").rename(source / shard)
    for other in (
        "consolidated.00.safetensors",
        "original.safetensors",
        "adapter_model.safetensors",
    ):
        shutil.copy(source / shard, source / other)
    (source / "consolidated.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
    index = {"metadata": {}, "weight_map": {"a": shard, "b": shard}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    name = "org/tiny" if origin == "Hub" else str(source)
    assert fetch(*PRETRAINED, f"model.name={name}").code == 0
    folder = layout.model_folder(home, name)
    found = {str(p.relative_to(folder)) for p in folder.rglob("*.safetensors*")}
    assert found == {shard, "model.safetensors.index.json"}


@pytest.mark.parametrize(
    ("shard", "said"),
    [
        ("pytorch_model.bin", "no safetensors file within it"),
        ("../tiny/model.safetensors", "no safetensors file within it"),
        ("elsewhere.safetensors", "elsewhere.safetensors, which is not there"),
        (None, "names no shards"),
        ("model.safetensors", 'has no metadata; add to it: "metadata": {}'),
    ],
)
def test_an_index_that_names_what_cannot_be_taken_is_refused(server, fetch, shard, said):
    source = repository(server)
    (source / "model.safetensors").unlink()
    index = {"weight_map": {"a": shard} if shard else {}}
    if "metadata" not in said:
        index["metadata"] = {}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    result = fetch(*PRETRAINED)
    assert result.code == 1 and len(result.errors) == 1
    assert "model.safetensors.index.json " in result.errors[0] and said in result.errors[0]


def test_weights_that_transformers_does_not_find_are_named(server, fetch):
    source = repository(server)
    (source / "model.safetensors").rename(source / "consolidated.safetensors")
    (source / "pytorch_model.bin").unlink()
    result = fetch(*PRETRAINED)
    assert result.code == 1
    assert "transformers loads no consolidated.safetensors" in result.errors[0]


def test_a_remote_code_entry_of_a_built_in_architecture_does_no_harm(server, fetch):
    config = repository(server) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"A": "own.B"}}))
    assert fetch(*PRETRAINED).code == 0


def test_a_data_set_that_is_a_script_is_refused(server, home, fetch):
    folder = repository(server, "datasets", "org/scripted")
    folder.mkdir(parents=True)
    (folder / "scripted.py").write_text("print('hello')")
    (folder / "data.jsonl").write_text('{"text": "a"}\n')
    result = fetch("data.name=org/scripted")
    assert result.code == 1 and "script scripted.py" in result.lines[0], result
    assert "set data.revision=refs/convert/parquet" in result.lines[0]
    assert visible(home) == []
    (folder / "data.jsonl").unlink()
    (folder / "scripted.py").rename(folder / "loader.py")
    assert "refs/convert/parquet" in fetch("data.name=org/scripted").lines[0]


def test_of_the_hubs_conversion_a_subset_with_its_splits_arrives(server, home, fetch):
    folder = repository(server, "datasets", "org/hc3")
    folder.mkdir(parents=True)
    (folder / "hc3.py").write_text("print('hello')")
    converted = folder.with_name("hc3@refs%2Fconvert%2Fparquet")
    names = ["all/train/0000", "all/train/0001", "finance/partial-train_sft/0000"]
    for name in [*names, "finance/train_gen/0000", "finance/test/0000"]:
        (converted / name).parent.mkdir(parents=True, exist_ok=True)
        (converted / f"{name}.parquet").write_bytes(b"PAR1")
    branch = ["data.name=org/hc3", "data.revision=refs/convert/parquet"]
    for arguments in (branch, [*branch, "data.subset=law"]):
        result = fetch(*arguments)
        assert result.code == 1 and len(result.lines) == 1, result
        assert "has the subsets all, finance; set data.subset" in result.lines[0]
    result = fetch(*branch, "data.subset=finance", "data.split=train_sft")
    assert result.code == 0, result
    assert "converted only the first part of it (finance/partial-train_sft" in result.lines[1]
    manifest = read_manifest(layout.dataset_folder(home, "org/hc3", "finance"))
    assert {split: [*map(Path, names)] for split, names in manifest["splits"].items()} == {
        "train_sft": [Path("finance/partial-train_sft/0000.parquet")],
        "train_gen": [Path("finance/train_gen/0000.parquet")],
        "test": [Path("finance/test/0000.parquet")],
    }
    assert len(manifest["files"]) == 3


def test_a_model_that_does_not_fit_is_refused_before_it_is_fetched(server, home, fetch):
    disk = "import shutil; shutil.disk_usage = lambda _: type('Usage', (), {'free': 12_345})"
    result = fetch(*PRETRAINED, patch=disk)
    assert result.code == 1 and len(result.lines) == 1, result
    assert "needs 8" in result.lines[0] and "12 kB are free" in result.lines[0]
    assert "free some space" in result.lines[0]
    assert visible(home) == []
    assert not [r for r in server.requests if r.path.endswith("model.safetensors")]


def test_a_disk_that_is_full_in_spite_of_what_it_said_is_told(server, home, fetch):
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(home)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk without root")
    try:
        (home / "filler").write_bytes(b"x" * (180 << 10))
        quota = "from trainstack.storage import files; files.free_bytes = lambda _: 1 << 40"
        result = fetch(*PRETRAINED, patch=quota)
        assert result.code == 1 and len(result.lines) == 2, result
        assert "error: model org/tiny: the disk or your quota is full" in result.lines[1]
        assert visible(home) == ["filler"]
    finally:
        subprocess.run(["umount", str(home)], check=True)


def test_a_folder_that_may_not_be_written_is_told_in_one_line(tmp_path):
    refused = OSError(errno.EACCES, "Permission denied", str(tmp_path))
    assert files.disk_problem(refused) == (
        f"no permission to write at {tmp_path}; ask its owner, or move SHARED_DIR"
    )


def test_wrong_usage_exits_2(call):
    result = call("model.nme=org/tiny")
    assert result.code == 2 and "did you mean model.name?" in result.lines[0]


# Interruption


def start(fetch, *arguments: str) -> subprocess.Popen:
    command = [*fetch.command, "--config", str(PROJECT / "config.yaml"), *arguments]
    return subprocess.Popen(command, env=fetch.environment, stderr=subprocess.PIPE, text=True)


def wait_for_request(server, name: str) -> None:
    deadline = time.monotonic() + 20
    while not any(r.method == "GET" and r.path.endswith(name) for r in server.requests):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_fetch_shows_nothing_and_the_next_call_continues_after_its_whole_files(
    server, home, fetch, stop
):
    server.faults.append({"path": "GET .*safetensors", "kind": "stall"})
    process = start(fetch, *PRETRAINED)
    wait_for_request(server, "model.safetensors")
    partial = next((home / "models/org").glob(".tiny.*.partial"))
    # The client notes that a file is whole after it has its name; killed between, it asks again.
    noted = partial / ".cache" / "huggingface" / "download" / "tokenizer.json.metadata"
    while not (noted.exists() and noted.read_text().count("\n") >= 3):
        time.sleep(0.02)
    process.send_signal(stop)
    error = process.communicate(timeout=5)[1]
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[stop]
    assert "Traceback" not in error
    assert not (home / "models/org/tiny").exists()
    server.requests.clear()
    assert fetch(*PRETRAINED).code == 0
    fetched = [r.path.rpartition("/")[2] for r in server.requests if "/resolve/" in r.path]
    assert "tokenizer.json" not in fetched and "model.safetensors" in fetched
    assert [path.name for path in (home / "models/org").iterdir()] == ["tiny"]
    assert list(damage(home / "models/org/tiny")) == []


def test_what_an_earlier_fetch_brought_is_dropped_if_it_is_not_wanted(server, home, fetch):
    server.faults.append({"path": "GET .*/tokenizer.json", "kind": 503, "times": 5})
    assert fetch(*PRETRAINED).code == 1
    assert any(path.endswith("model.safetensors") for path in visible(home))
    assert fetch("model.name=org/tiny").code == 0
    names = ["config.json", "manifest.json", "tokenizer.json", "tokenizer_config.json"]
    assert visible(home) == [f"models/org/tiny/{name}" for name in names]


def test_a_stopped_refresh_leaves_the_old_copy_in_use(server, home, fetch):
    fetch(*PRETRAINED)
    server.faults.append({"path": "GET .*safetensors", "kind": "stall"})
    process = start(fetch, *PRETRAINED, "--force")
    server.requests.clear()
    wait_for_request(server, "model.safetensors")
    assert list(damage(home / "models/org/tiny")) == []
    process.kill()
    process.communicate()
    assert list(damage(home / "models/org/tiny")) == []
    server.requests.clear()
    assert fetch(*PRETRAINED).code == 0 and server.requests == []


def test_two_calls_at_once_fetch_each_file_once(server, home, fetch):
    both = [start(fetch, *PRETRAINED) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    fetched = [r for r in server.requests if r.method == "GET" and "/resolve/" in r.path]
    assert len(fetched) == 4
    assert list(damage(home / "models/org/tiny")) == []


# Secrets


def test_the_token_reaches_the_hub_and_nothing_else(server, home, fetch):
    server.gated.add("org/tiny")
    server.private.add("org/tiny")
    server.tokens.add(TOKEN)
    result = fetch(*PRETRAINED, HF_TOKEN=TOKEN)
    assert result.code == 0
    assert {r.authorization for r in server.requests} == {f"Bearer {TOKEN}"}
    assert not any(TOKEN in line for line in result.lines)
    for path in home.rglob("*"):
        assert TOKEN not in path.name
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_a_token_that_cannot_be_sent_is_told(fetch):
    result = fetch(*PRETRAINED, HF_TOKEN="hf_schlüssel")
    assert result.code == 1 and "Traceback" not in "".join(result.lines), result
    assert all(line.endswith("none has; set HF_TOKEN again") for line in result.errors), result


def test_a_token_that_strays_into_a_message_is_redacted(fetch):
    result = fetch(f"model.name=org/{TOKEN}", f"data.name=org/{TOKEN[:20]}", HF_TOKEN=TOKEN)
    assert len(result.errors) == 2
    assert all("org/[token]" in line and "hf_Q7" not in line for line in result.errors)
    result = fetch("model.name=org/of-a-mirror", HF_TOKEN="of-a-mirror")
    assert "model org/[token]" in result.errors[0] and "of-a-mirror" not in result.errors[0]


# Local originals


def local_model(tmp_path, tokenizer_json) -> tuple[Path, list[str], Path]:
    folder = write_model(tmp_path / "my models/mine", tokenizer_json)
    arguments = [f"model.name={folder}", "model.init=pretrained"]
    return folder, arguments, layout.model_folder(tmp_path / "home", str(folder))


@pytest.mark.parametrize("name", ["texts/train.jsonl", "texts/deep", "texts", "train.jsonl"])
@pytest.mark.parametrize("key", ["data", "model"])
def test_a_name_that_is_here_too_is_asked_about_without_a_request(tmp_path, home, call, key, name):
    for path in ("texts/train.jsonl", "texts/deep/a.jsonl", "train.jsonl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text('{"text": "a"}\n')
    result = call(f"{key}.name={name}")
    kind = "file" if name.endswith("l") else "folder"
    said = f"{name}: is a {kind} here; write ./{name} if you mean it, or run this in another"
    assert result.code == 1 and len(result.lines) == 1 and said in result.lines[0], result
    assert visible(home) == []


def test_the_name_of_a_file_that_is_not_here_is_not_sought_on_the_hub(tmp_path, home, call):
    result = call("data.name=train.jsonl")
    assert result.code == 1 and len(result.lines) == 1, result
    assert "train.jsonl: no such file in /" in result.lines[0] and visible(home) == []


@pytest.mark.parametrize("name", ["*.jsonl", "a.jsonl,./b.jsonl", "[ab].jsonl"])
def test_a_pattern_and_a_list_of_local_files_are_told_what_takes_several(tmp_path, call, name):
    for path in ("a.jsonl", "b.jsonl"):
        (tmp_path / path).write_text('{"text": "a"}\n')
    result = call(f"data.name='./{name}'")
    assert result.code == 1 and "no such file or folder; for several" in result.lines[0], result
    mixture = "data.mixture=[{name: ./b.jsonl, weight: null}]"
    assert call("data.name=./a.jsonl", mixture).code == 0, "as that line says"


def test_a_local_model_is_linked_not_copied(tmp_path, call, tokenizer_json):
    original, arguments, folder = local_model(tmp_path, tokenizer_json)
    assert call(*arguments).code == 0
    manifest = read_manifest(folder)
    facts = (manifest["source"], manifest["revision"], manifest["parameters"])
    assert facts == ("local", None, 20007)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert os.readlink(folder / name) == str(original / name)
        assert manifest["files"][name]["sha256"] == sha256(original / name)
    assert "pytorch_model.bin" not in manifest["files"]
    assert "is here (linked" in call(*arguments).lines[0]


def test_the_named_templates_of_a_local_model_come_along(tmp_path, call, tokenizer_json):
    original, arguments, folder = local_model(tmp_path, tokenizer_json)
    name = "additional_chat_templates/tool_use.jinja"
    (original / name).parent.mkdir()
    (original / name).write_text("{{ messages }}")
    assert call(*arguments).code == 0
    assert (folder / name).read_text() == "{{ messages }}" and name in read_manifest(folder)[
        "files"
    ]


def test_a_changed_local_original_is_an_error_until_it_is_meant(tmp_path, call, tokenizer_json):
    original, arguments, folder = local_model(tmp_path, tokenizer_json)
    call(*arguments)
    (original / "tokenizer_config.json").write_text('{"eos_token": "<edn>"}')
    result = call(*arguments)
    assert result.code == 1 and len(result.lines) == 1
    assert "tokenizer_config.json: hash differs" in result.lines[0]
    assert "FORCE_REFRESH=1" in result.lines[0]
    assert call(*arguments, "--force").code == 0
    assert list(damage(folder)) == []
    assert call(*arguments).code == 0


def test_submit_and_download_say_the_same_of_a_changed_original(tmp_path, home, call):
    original, others = tmp_path / "a.jsonl", ["model.name=demo"]
    original.write_text('{"text": "a"}\n')
    name = [f"data.name={original}", *others]
    asset = Asset("dataset", str(original), "main", home)
    command = f"bash download_data_model.sh data.name={original}"
    assert asset_problem(asset, command) == f"is not in the project's folder yet; run: {command}"
    assert call(*name).code == 0 and not asset_problem(asset, command)
    original.write_text('{"text": "b"}\n')
    downloaded = call(*name).lines[0]
    submitted = asset_problem(asset, command)
    same = f"changed since {read_manifest(asset.folder)['fetched_at']} (a.jsonl: hash differs)"
    assert f"{same}; if that is meant, run this again with FORCE_REFRESH=1" in downloaded
    assert submitted == f"{same}; if that is meant, run: FORCE_REFRESH=1 {command}"
    assert call(*name, "--force").code == 0 and not asset_problem(asset, command)
    original.unlink()
    assert asset_problem(asset, command).startswith("cannot be used: no such file or folder")


def test_a_large_local_original_of_the_same_size_is_compared_when_it_was_touched(tmp_path, call):
    original = tmp_path / "large.txt"
    original.write_bytes(b"word " * (TRUSTED_BY_SIZE // 5 + 1))
    arguments = [f"data.name={original}"]
    assert call(*arguments).code == 0
    original.touch()
    assert call(*arguments).code == 0
    with original.open("r+b") as file:
        file.write(b"WORD")
    result = call(*arguments)
    assert result.code == 1 and "large.txt: hash differs" in result.lines[0]


def test_a_file_that_joins_a_local_data_folder_is_noticed(tmp_path, call):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "b"}\n'))
    (folder / "notes.md").write_text("not data")
    arguments = ["data.name=./texts"]
    assert call(*arguments).code == 0
    linked = read_manifest(layout.dataset_folder(tmp_path / "home", str(folder), None))
    assert linked["splits"] == {"train": ["a.jsonl", "deep/b.jsonl.gz"]}
    assert list(linked["files"]) == ["a.jsonl", "deep/b.jsonl.gz"]
    (folder / "cache-0a1b2c3d4e5f6789.arrow").write_bytes(b"of the library datasets")
    assert call(*arguments).code == 0
    (folder / "c.jsonl").write_text('{"text": "c"}\n')
    result = call(*arguments)
    assert result.code == 1 and "files were added or removed" in result.lines[0]


FOLDERS = [
    (["adapter_config.json", "adapter_model.safetensors"], "is an adapter to another model"),
    (["config.json", "adapter_config.json", "adapter_model.safetensors"], "is an adapter to"),
    (["model-Q4.gguf"], "has its weights as GGUF; name what they were made from"),
    (["config.json", "model-Q4.gguf"], "has its weights as GGUF; name what they were made from"),
    (["config.json", "optimizer.pt"], "has no model.safetensors; bring it too"),
    (["checkpoint-9/config.json"], "has config.json only further down (checkpoint-9); name that"),
    (["checkpoints/checkpoint-9/config.json"], "down (checkpoints/checkpoint-9); name that folder"),
    (["refs/main", "snapshots/a/config.json"], "is the Hub's cache of it; name one revision, as"),
    (["tokenizer.json"], "has no config.json, which says what the model is; put it there"),
]


@pytest.mark.parametrize(("names", "said"), FOLDERS, ids=str)
def test_what_a_folder_is_that_is_no_whole_model_is_said_with_what_to_name(
    tmp_path, home, call, names, said
):
    for name in names:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("{}")
    result = call("model.name=./mine", "model.init=pretrained")
    assert result.code == 1 and len(result.lines) == 1 and said in result.lines[0], result
    assert visible(home) == []


def test_of_the_hubs_own_cache_one_revision_is_to_be_named(tmp_path, call):
    for commit in ("a1", "b2"):
        (tmp_path / "datasets--org--x" / "snapshots" / commit).mkdir(parents=True)
        data = tmp_path / "datasets--org--x" / "snapshots" / commit / "train.jsonl"
        data.write_text('{"text": "a"}\n')
    (tmp_path / "datasets--org--x" / "refs").mkdir()
    (tmp_path / "datasets--org--x" / "refs" / "main").write_text("b2")
    said = call("data.name=./datasets--org--x").lines[0]
    assert "is the Hub's cache of it; name one revision, as snapshots/b2" in said
    assert call("data.name=./datasets--org--x/snapshots/b2").code == 0


def test_an_adapter_beside_whole_weights_is_not_loaded_and_said(tmp_path, call, tokenizer_json):
    original, arguments, folder = local_model(tmp_path, tokenizer_json)
    (original / "adapter_config.json").write_text("{}")
    assert "not used: its adapter (adapter_config.json)" in call(*arguments).lines[0]
    assert not (folder / "adapter_config.json").exists()


def test_a_gguf_file_is_no_model(tmp_path, call):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert "has its weights as GGUF" in call("model.name=./m.gguf").lines[0]


def test_files_of_no_split_may_be_named_after_the_one_that_is_missing(tmp_path, call):
    for name in ("data.jsonl", "eval.jsonl"):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text('{"text": "a"}\n')
    (line,) = call("data.name=./texts").errors
    assert "eval.jsonl is split test by its name, and 1 file belongs to no split (data" in line
    assert line.endswith("or put train into the names of those that are meant")
    (tmp_path / "texts/data.jsonl").rename(tmp_path / "texts/data-train.jsonl")
    assert call("data.name=./texts").code == 0, "as that line says"


@pytest.mark.parametrize(
    ("lacks", "cause"),
    [
        ("", "no such file or folder"),
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer"),
        ("model.safetensors", "pytorch_model.bin"),
    ],
)
def test_a_local_model_that_lacks_something_is_refused(
    tmp_path, home, call, tokenizer_json, lacks, cause
):
    original, arguments, _ = local_model(tmp_path, tokenizer_json)
    if lacks:
        (original / lacks).unlink()
    else:
        shutil.rmtree(original)
    result = call(*arguments)
    assert result.code == 1 and len(result.lines) == 1 and cause in result.lines[0], result
    assert visible(home) == []


def test_a_subset_or_split_that_is_not_there_is_told_with_those_that_are(tmp_path, home, call):
    name = f"data.name={write_data(tmp_path / 'texts')}"
    none, unknown = call(name), call(name, "data.subset=huge")
    no_split = call(name, "data.subset=small", "data.split=dev")
    for result, cause in (
        (none, "['large', 'small']"),
        (unknown, "['large', 'small']"),
        (no_split, "has no split dev; set data.split, or data.eval_split, to one of: train, test"),
    ):
        assert result.code == 1 and len(result.lines) == 1 and cause in result.lines[0], result
    assert visible(home) == []


def test_data_files_that_belong_to_no_split_are_mentioned(tmp_path, call):
    for name in ("train-a.jsonl", "train-b.jsonl", "c.txt", "d.jsonl"):
        (tmp_path / "texts" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text('{"text": "a"}\n')
    result = call("data.name=./texts")
    assert result.code == 0, result
    assert "not linked: 1 .txt, beside .jsonl; name them as another data set" in result.lines[1]
    assert "not linked: 1 file belongs to no split (d.jsonl)" in result.lines[0]


@pytest.mark.parametrize("word", ["train", "test"])
def test_a_note_whose_name_has_a_word_for_a_split_does_not_stand_for_its_folder(
    tmp_path, home, call, word
):
    odd = tmp_path / "texts" / f"my-{word}-journey.txt"
    odd.parent.mkdir()
    for name in ("note-1.txt", "note-2.txt", odd.name):
        (odd.parent / name).write_text(name)
    result = call("data.name=./texts")
    (line,) = result.lines
    assert result.code == 1 and visible(home) == []
    assert f"{odd.name} is split {word} by its name, and 2 files belong to no split" in line
    assert "take the word out of its name" in line
    odd.rename(odd.parent / "my-journey.txt")
    result = call("data.name=./texts")
    assert result.code == 0 and "linked, 3 files verified" in result.lines[-1], result


def test_files_that_are_there_twice_are_told_and_one_in_two_patterns_is_read_once(tmp_path, call):
    folder = tmp_path / "texts"
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n"
    card += "  - split: test\n    path: test.jsonl\n---\n"
    contents = {"README.md": card.format("[a.jsonl, '*.jsonl', copy.jsonl, a.jsonl.gz]")}
    contents |= {f"{name}.jsonl": f'{{"text": "{name}"}}\n' for name in ("a", "b", "test")}
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_text(content)
    (folder / "copy.jsonl").write_bytes((folder / "b.jsonl").read_bytes())
    (folder / "a.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    result = call("data.name=./texts", "data.eval_split=test")
    assert result.code == 0, result
    (linked,) = (tmp_path / "home/datasets").rglob("manifest.json")
    splits = read_manifest(linked.parent)["splits"]
    assert sorted(splits["train"]) == [
        "a.jsonl", "a.jsonl.gz", "b.jsonl", "copy.jsonl", "test.jsonl",
    ]  # fmt: skip
    for said in (
        "copy.jsonl seems to be b.jsonl again (the same content); take one away if it is",
        "a.jsonl.gz seems to be a.jsonl again (the same name); take one away if it is",
        "test.jsonl is in the splits train and test; take it out of one",
    ):
        assert sum(said in line for line in result.lines) == 1, (said, result.lines)


SHARDS = {
    "whole": (["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "eval-1-of-1.json"], []),
    "counted from one": (["part_1-of-2.txt", "part_2-of-2.txt"], []),
    "with hashes": (["train-00000-of-00002-ab1c.parquet", "train-00001-of-00002-9.parquet"], []),
    "one is missing": (
        ["train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"],
        ["of the 3 files train-*-of-* 1 are not there, first number 1; bring them"],
    ),
    "the last is missing": (["a-1-of-2.txt"], ["of the 2 files a-*-of-* 1 are not there, first"]),
    "two generations": (
        ["a-0-of-2.txt", "a-1-of-2.txt", "a-0-of-1.txt"],
        ["there are a-* of 1 files and of 2; take those away"],
    ),
}


@pytest.mark.parametrize("kind", SHARDS)
def test_numbered_files_that_are_not_whole_are_told(kind):
    names, expected = SHARDS[kind]
    found = data_files.missing_shards(names)
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


def test_files_that_cannot_be_read_are_counted_beside_those_that_are(tmp_path, fetch, call):
    files = {
        "a.jsonl": b'{"text": "a"}\n',
        "deep/b.jsonl.xz": b"x",
        "c.tsv": b"x",
        "notes.md": b"x",
        "LICENSE": b"x",
    }
    for name, content in {**files, "README.md": b"---\nlicense: mit\n---\n"}.items():
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(content)
    result = call("data.name=./texts")
    assert result.code == 0, result
    said = "not linked: 3 files that cannot be read (1 .tsv, 1 .xz, 1 .md; such as c.tsv); if meant"
    assert said in result.lines[0]


def test_a_data_folder_without_data_is_refused(tmp_path, home, call):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "README.md").write_text("Only a card.")
    (tmp_path / "texts" / "data.xlsx").write_text("")
    result = call("data.name=./texts")
    assert result.code == 1 and len(result.lines) == 1 and "has no .jsonl," in result.lines[0]
    assert "file (it has README.md, data.xlsx); convert to one" in result.lines[0]
    assert visible(home) == []


def test_data_of_a_kind_that_cannot_be_read_is_refused(tmp_path):
    sizes = {"train-0.h5": 1, "train-1.h5": 1, "notes.txt": 1}
    source = SimpleNamespace(sizes=sizes, folder=tmp_path, collect=lambda names: None)
    with pytest.raises(ConfigError, match="consists of files such as train-0.h5"):
        data_files.choose_data(source, "org/text", None)


LAYOUTS = [
    (["train/a.jsonl", "test/b.jsonl"], None,
     {"train": ["train/a.jsonl"], "test": ["test/b.jsonl"]}),
    (["x/train/a.jsonl", "x/test/b.jsonl"], None,
     {"train": ["x/train/a.jsonl"], "test": ["x/test/b.jsonl"]}),
    (["x/train/a.jsonl", "y/train/b.jsonl"], "y", {"train": ["y/train/b.jsonl"]}),
    (["x/train/a.jsonl", "y/train/b.jsonl"], None, "has the subsets x, y"),
    (["train/x/0000.parquet", "train/y/0000.parquet"], None,
     {"train": ["train/x/0000.parquet", "train/y/0000.parquet"]}),
    (["2023/01/a.txt", "2023/02/b.txt"], None, {"train": ["2023/01/a.txt", "2023/02/b.txt"]}),
    (["en/a.jsonl", "de/b.jsonl"], "de", {"train": ["de/b.jsonl"]}),
    (["en/a.jsonl", "de/b.jsonl"], "fr", "BuilderConfig 'fr' not found"),
    (["data.py", "a.jsonl"], None, {"train": ["a.jsonl"]}),
    (["DATA.JSONL", "b.Jsonl.GZ"], None, {"train": ["DATA.JSONL", "b.Jsonl.GZ"]}),
    (["Train.Parquet", "Test.Parquet"], None,
     {"train": ["Train.Parquet"], "test": ["Test.Parquet"]}),
    (["TRAIN/a.csv", "Eval/b.csv"], None, {"train": ["TRAIN/a.csv"], "test": ["Eval/b.csv"]}),
    (["a.jsonl", "A.jsonl"], None, {"train": ["A.jsonl", "a.jsonl"]}),
    (["data/Train_A-00000-of-00001.csv"], None, {"Train_A": ["data/Train_A-00000-of-00001.csv"]}),
    (["train.jsonl", "test.csv"], None, "files of one type"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "subset", "expected"), LAYOUTS, ids=str)
def test_folders_are_subsets_where_their_own_folders_are_splits(names, subset, expected):
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            data_files.resolve_splits(names, {}, subset)
    else:
        assert data_files.resolve_splits(names, {}, subset) == expected


@pytest.mark.parametrize("kind", ["one", "several"])
def test_a_folder_that_save_to_disk_wrote_is_read_with_its_splits(tmp_path, home, call, kind):
    import datasets

    datasets.disable_progress_bars()
    made = datasets.Dataset.from_dict({"text": [f"one {n}" for n in range(100)]})
    folder = tmp_path / "saved"
    several = datasets.DatasetDict({"train": made, "valid": made.select(range(9))})
    (made if kind == "one" else several).save_to_disk(
        folder, **({"num_shards": 2} if kind == "one" else {})
    )
    (folder / "data-00000-of-00009.arrow").write_bytes(b"of another save")
    result = call(f"data.name={folder}")
    assert result.code == 0, result
    linked = layout.dataset_folder(home, str(folder), None)
    shards = [f"data-0000{n}-of-00002.arrow" for n in range(2)]
    last = "data-00000-of-00001.arrow"
    assert read_manifest(linked)["splits"] == (
        {"train": shards} if kind == "one" else {s: [f"{s}/{last}"] for s in ("train", "valid")}
    )
    paths = split_files(linked, "train")
    assert sum(len(chunk.content) for path in paths for chunk in read_chunks(path)) == 100
    next(folder.rglob("data-*[12].arrow")).unlink()
    result = call(f"data.name={folder}", "--force")
    assert result.code == 1 and "which its state.json names" in result.errors[0], result


@pytest.mark.parametrize("name", ["test.jsonl", "a [1].txt", "VALIDATION.TXT", "x.csv"])
def test_a_single_file_is_the_training_split_whatever_its_name(tmp_path, home, call, name):
    path = tmp_path / name
    path.write_text("text\none two\n")
    result = call(f"data.name={path}")
    assert result.code == 0, result
    linked = layout.dataset_folder(home, str(path), None)
    assert read_manifest(linked)["splits"] == {"train": [name]}


def test_a_link_that_leads_nowhere_and_a_pointer_of_git_lfs_are_named(tmp_path, home, call):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert "b.jsonl links to what is not there" in call(f"data.name={folder}").errors[0]
    (folder / "b.jsonl").unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (folder / "c.parquet").write_text(pointer)
    (folder / "a.jsonl").unlink()
    (said,) = call(f"data.name={folder}").errors
    assert "c.parquet is a pointer of git-lfs" in said and f"in {folder}: git lfs pull" in said
    assert visible(home) == []


def test_links_to_folders_are_followed_each_folder_once(tmp_path, call):
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for path in (folder / "v1/a.jsonl", elsewhere / "b.jsonl", folder / ".git/c.jsonl"):
        path.parent.mkdir(parents=True)
        path.write_text('{"text": "a"}\n')
    (folder / "more").symlink_to(elsewhere)
    (folder / "latest").symlink_to(folder / "v1")
    (folder / "v1" / "up").symlink_to(tmp_path)
    (elsewhere / "round").symlink_to(elsewhere)
    assert call(f"data.name={folder}").code == 0
    linked = read_manifest(layout.dataset_folder(tmp_path / "home", str(folder), None))
    assert linked["splits"] == {"train": ["more/b.jsonl", "v1/a.jsonl"]}


@pytest.mark.parametrize("kind", ["data", "model"])
def test_what_may_not_be_read_is_named_and_no_advice_on_writing(
    tmp_path, call, tokenizer_json, monkeypatch, kind
):
    folder = write_model(tmp_path / "mine", tokenizer_json)
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    refused = folder / ("a.jsonl" if kind == "data" else "config.json")
    usual = Path.open

    def open_but_one(path, *arguments, **options):
        if path == refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_but_one)
    (line,) = [n for n in call(f"{kind}.name={folder}").lines if "error" in n]
    assert f"{refused} cannot be read (Permission denied); ask its owner" in line


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b""])
def test_a_weight_file_that_is_none_is_refused(tmp_path, call, tokenizer_json, content):
    original, arguments, folder = local_model(tmp_path, tokenizer_json)
    (original / "model.safetensors").write_bytes(content)
    result = call(*arguments)
    assert result.code == 1 and "git lfs pull" in result.errors[0] and not folder.exists()


# The script around it


@pytest.fixture
def checkout(tmp_path):
    """A copy of the project in a path with a space, whose environment is this one."""
    folder = tmp_path / "a checkout"
    shutil.copytree(PROJECT / "trainstack", folder / "trainstack")
    for name in ("download_data_model.sh", "config.yaml"):
        shutil.copy(PROJECT / name, folder)
    (folder / "setup.sh").write_text('[[ "$1" == --is-ready && -z "${NOT_READY:-}" ]]\n')
    (folder / "env.sh").write_text(
        f'export TRAINSTACK_HOME="{tmp_path}/shared home"\n'
        f'export TRAINSTACK_PYTHON="{sys.executable}"\n'
    )
    return folder


def download(checkout, fetch, *arguments: str, **variables: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        ["bash", str(checkout / "download_data_model.sh"), *arguments],
        capture_output=True,
        text=True,
        env={**fetch.environment, **variables},
        cwd=checkout.parent,
    )
    return done.returncode, done.stderr.splitlines()


def test_the_script_fetches_tokenises_proves_and_says_what_comes_next(
    tmp_path, server, checkout, fetch
):
    write_data(repository(server, "datasets", "org/text"))
    wanted = {"MODEL_NAME": "org/tiny", "DATASET_NAME": "org/text", "DATASET_SUBSET": "large"}
    code, lines = download(checkout, fetch, **wanted)
    assert code == 0, lines
    folder = tmp_path / "shared home"
    assert (folder / "models/org/tiny/manifest.json").exists()
    assert (folder / "datasets/org/text@large/manifest.json").exists()
    assert any("documents (text) -> " in line for line in lines), lines
    called = str(checkout / "submit.sh").replace(" ", "\\ ")  # as the script itself was
    assert "data.name=\\'org/text\\'" in lines[-1] and f"bash {called} " in lines[-1]
    assert str(checkout / "config.yaml") in lines[-1]


def test_the_script_asks_for_setup_if_the_environment_is_not_ready(checkout, fetch):
    code, lines = download(checkout, fetch, NOT_READY="1")
    assert code == 1 and len(lines) == 1 and "run: bash setup.sh" in lines[0]


def test_the_script_stops_at_a_config_file_that_is_not_there(checkout, fetch):
    code, lines = download(checkout, fetch, "recipes/none.yaml")
    assert code == 2 and lines == [
        "download_data_model.sh: error: recipes/none.yaml: no such config file;"
        " name one, such as config.yaml"
    ]


def test_the_script_passes_the_failure_of_the_fetch_on(server, checkout, fetch):
    code, lines = download(checkout, fetch, MODEL_NAME="org/none")
    assert code == 1 and len(lines) == 1 and lines[0].startswith("hub: error: model org/none")


def test_the_help_is_the_header_of_the_script(checkout, fetch):
    done = subprocess.run(
        ["bash", str(checkout / "download_data_model.sh"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "FORCE_REFRESH=1" in done.stdout and "#" not in done.stdout


@pytest.mark.parametrize("missing", [1, 40])
def test_weights_whose_end_is_missing_are_refused(tmp_path, call, tokenizer_json, missing):
    original, arguments, folder = local_model(tmp_path, tokenizer_json)
    weights = original / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-missing])
    result = call(*arguments)
    assert "model.safetensors is no whole safetensors file (" in result.errors[0]
    assert "not fully covered); bring it again" in result.errors[0]
    assert result.code == 1 and not folder.exists()


@pytest.mark.parametrize("content", ["[]", '{"eos_token": ', "\udcff"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_settings_that_are_no_json_object_are_refused(
    tmp_path, call, tokenizer_json, name, content
):
    original, arguments, folder = local_model(tmp_path, tokenizer_json)
    (original / name).write_text(content, errors="surrogateescape")
    result = call(*arguments)
    assert f"{name} " in result.errors[0] and "not a JSON object" in result.errors[0]
    assert len(result.errors) == result.code == 1 and not folder.exists()


def splits_of(
    settings: str, subset: str | None = None, name: str = "a.csv"
) -> dict[str, list[str]]:
    """Of a README with one subset of one file."""
    own = f"- config_name: {subset or 'default'}\n  data_files: {name}\n{settings}"
    card = f"---\nconfigs:\n{own}---\n"
    return data_files.resolve_splits([name, "README.md"], {"README.md": card.encode()}, subset)


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("configs:\n- config_name: a\n  data_files: b.jsonl\n", "find 'b.jsonl'); set data.subset"),
        ("configs: [\n", "correct its README.md"),
        (
            "configs:\n- config_name: a\n  data_files:\n  - {split: x, path: 'b*.jsonl'}\n"
            "  - {split: y, path: README.md}\n",
            "(no file is at the paths of split x)",
        ),
        ("license: [\n", "correct its README.md"),
        ("configs:\n- config_name: a\n  data_files: A.JSONL\n", "give A.JSONL a suffix in small"),
    ],
)
def test_a_readme_that_leads_nowhere_is_to_be_corrected(card, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        data_files.resolve_splits(
            ["A.JSONL", "README.md"], {"README.md": f"---\n{card}---".encode()}, None
        )


@pytest.mark.parametrize("subset", ["no", "2024", "1.0", "null", "plain"])
def test_the_name_of_a_subset_is_a_text_whatever_yaml_reads(subset):
    assert splits_of("", subset) == {"train": ["a.csv"]}


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("a.csv", "  sep: ';'\n", "sep=';'"),
        ("a.csv", "  delimiter: ';'\n  skiprows: 1\n", "sep=';', skiprows=1"),
        ("a.csv", "  header: null\n  column_names: [a, text]\n", "names=['a', 'text']"),
        ("a.txt", "  sample_by: paragraph\n", "sample_by='paragraph'"),
        ("a.json", "  field: data\n", "field='data'"),
        ("a.csv", "  sep: ','\n  encoding: utf-8\n", ""),
    ],
)
def test_a_readme_that_wants_files_read_otherwise_is_refused(name, settings, said):
    if not said:
        assert splits_of(settings, None, name) == {"train": [name]}
        return
    with pytest.raises(ConfigError, match=re.escape(said)):
        splits_of(settings, None, name)


@pytest.mark.parametrize(
    ("settings", "said"),
    [((), "split test, validation"), (("data.eval_split=validation",), "split test")],
)
def test_splits_that_are_there_and_not_used_are_named(tmp_path, call, settings, said):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("train", "validation", "test"):
        (folder / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    result = call(f"data.name={folder}", *settings)
    lines = [line for line in result.lines if "not used: split" in line]
    assert [f"not used: {said} (data.split" in line for line in lines] == [True]
