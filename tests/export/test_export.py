"""A checkpoint becomes a folder that others load, with a card that tells no secrets."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tiny
from hub_server import HubServer
from trainstack.errors import ConfigError, Failed
from trainstack.export import command
from trainstack.export.folder import export
from trainstack.export.source import Way, find_source
from trainstack.prepare import prepare
from trainstack.storage import files, layout, manifest

TOKEN = "hf_" + "Q7w9" * 8
COMMIT = "5e1c" * 10
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}<|end|> {% endfor %}"
    "{% if add_generation_prompt %}two {% endif %}"
)
WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
ARCHITECTURES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "qwen3_moe": {  # whose experts are one tensor in memory
        **WIDE, **HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "head_dim": 8},
    "deepseek_v3": {  # of which transformers keeps a part in fp32
        **WIDE, **HEADS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "n_shared_experts": 1},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 8, "context_length": 64},  # see held_out.py
}  # fmt: skip


def publish_again(folder: Path, **facts) -> None:
    """Give a published folder other facts, and the files that are in it now."""
    known = manifest.read_manifest(folder) | facts
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    known["files"] = {n: manifest.hash_file(folder / n) for n in names if n != manifest.MANIFEST}
    (folder / manifest.MANIFEST).unlink()
    entries = known.pop("files")
    manifest.write_manifest(folder, entries, **known)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Runs of a base model with untied weights that came from the Hub, and of a chat."""
    home = tmp_path_factory.mktemp("project") / "trainstack"
    folder = tiny.make_model(home, "org/base")
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    causal_lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    causal_lm.save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    publish_again(folder, source="hub", revision="main", commit=COMMIT, weight_bytes=size)
    data = tiny.make_dataset(home, "org/data")
    publish_again(data, source="hub", revision="main", commit=COMMIT[::-1])
    tiny.make_model(home, "./chat", TEMPLATE)
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "three four"}]
    lines = (json.dumps({"messages": turns}) + "\n") * 100
    tiny.publish(layout.dataset_folder(home, "./chats", None), {"a.jsonl": lines})
    names = {"model__name": "org/base", "model__init": "pretrained", "data__name": "org/data"}
    run(home, "r", **names)
    run(home, "adapted", **names, adapter__type="lora", checkpoint__save_steps=20)
    names = {"model__name": "./chat", "data__name": "./chats", "data__packing": "best_fit"}
    steps = {"train__max_steps": 60, "checkpoint__save_steps": 60, "eval__eval_steps": None}
    run(home, "chat", **names, **steps, data__eval_fraction=0, eval__prompts=[])
    return home


def run(home: Path, name: str, **changes) -> None:
    """Prepare and train, as a user in the folder above would."""
    tiny.write_config(home, **changes)
    arguments = ["--home", str(home), "--config", str(home / "config.yaml")]
    assert prepare.main([*arguments, "--processes", "1"]) == 0
    tiny.train(home, 1, f"run.name={name}")


@pytest.fixture
def call(project, monkeypatch, capsys):
    """``python -m trainstack export`` in this process; its lines. ConfigError as it raises."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run_it(*arguments) -> list[str]:
        assert command.main([*map(str, arguments), "--home", str(project)]) == 0
        said = capsys.readouterr().err.splitlines()
        assert all(line.startswith("export: ") for line in said), said
        return said

    return run_it


def checkpoint(project: Path, name: str, step: int) -> Path:
    return layout.run_folder(project, name) / "checkpoints" / f"checkpoint-{step}"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 40)[None], use_cache=False).logits[0]


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.mark.parametrize("name, step", [("r", 20), ("chat", 60)], ids=["untied", "tied"])
def test_an_export_in_fp32_says_what_the_checkpoint_says_bit_for_bit(
    project, call, tmp_path, name, step
):
    said = call(name, "--to", tmp_path / "out")
    assert f"are those of checkpoint-{step}, bit for bit" in said[1]
    exported, own = load(tmp_path / "out"), load(checkpoint(project, name, step))
    assert torch.equal(logits(exported), logits(own))
    is_tied = exported.lm_head.weight is exported.model.embed_tokens.weight
    assert is_tied == (name == "chat")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("one two")["input_ids"] == [1, 2]
    assert not (tmp_path / "out/training").exists()
    assert manifest.is_whole(tmp_path / "out")


@pytest.mark.parametrize("dtype, name", [("bf16", "bfloat16"), ("fp16", "float16")])
def test_an_export_in_half_has_the_checkpoints_weights_rounded_and_loads_as_such(
    project, call, tmp_path, dtype, name
):
    call("r@15", "--to", tmp_path / "out", "--dtype", dtype)
    own = load_file(checkpoint(project, "r", 15) / "model.safetensors")
    found = load_file(tmp_path / "out/model.safetensors")
    kind = getattr(torch, name)
    assert found.keys() == own.keys()
    assert all(torch.equal(found[key], own[key].to(kind)) for key in own)
    exported = load(tmp_path / "out")
    assert exported.dtype == kind
    exact = logits(load(checkpoint(project, "r", 15)))
    torch.testing.assert_close(logits(exported).float(), exact, rtol=0.02, atol=0.05)


def test_a_large_model_is_written_in_shards_that_from_pretrained_finds(project, tmp_path):
    way = Way("fp32", False, shard_bytes=40_000)
    export(find_source("r", project), tmp_path / "out", way, print)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {*names}
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(checkpoint(project, "r", 20))))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_whatever_a_family_does_with_its_weights_an_export_is_the_same_model(
    project, tmp_path, kind
):
    own = tmp_path / "own"
    shutil.copytree(checkpoint(project, "r", 20), own)
    torch.manual_seed(3)
    config = CONFIG_MAPPING[kind](vocab_size=75, **ARCHITECTURES[kind])
    causal_lm = AutoModelForCausalLM.from_config(config)
    causal_lm.save_pretrained(own)
    publish_again(own)
    dtype = "fp16" if kind == "rwkv" else "bf16"  # in which it keeps parameters in fp32
    export(find_source(str(own), project), tmp_path / "out", Way(dtype, False), print)
    found = load_file(tmp_path / "out/model.safetensors")
    wanted = load_file(own / "model.safetensors")
    assert found.keys() == wanted.keys()
    kept = {name for name, tensor in found.items() if tensor.dtype == torch.float32}
    assert kept == {name for name in wanted if re.search("e_score|time_(decay|first)", name)}
    assert all(torch.equal(found[n], wanted[n].to(found[n].dtype)) for n in wanted)


def test_an_adapter_is_exported_beside_its_model_by_the_models_public_name(project, call, tmp_path):
    said = call("adapted", "--to", tmp_path / "out")
    assert "bit for bit" in said[1]
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/base" and settings["revision"] == COMMIT
    base = layout.model_folder(project, "org/base")
    found, own = (
        peft.PeftModel.from_pretrained(load(base), folder)
        for folder in (tmp_path / "out", checkpoint(project, "adapted", 20))
    )
    assert torch.equal(logits(found), logits(own))
    assert not torch.allclose(logits(found), logits(load(base)), atol=1e-2)
    head = front_matter(tmp_path / "out")
    assert head["library_name"] == "peft" and head["base_model_relation"] == "adapter"


def test_an_adapter_is_merged_into_its_model(project, call, tmp_path):
    said = call("adapted", "--to", tmp_path / "out", "--merge")
    assert re.fullmatch("export: merged, its logits are within .*e-0[78] of those .*", said[1])
    base = load(layout.model_folder(project, "org/base"))
    own = peft.PeftModel.from_pretrained(base, checkpoint(project, "adapted", 20))
    merged = load(tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(own), rtol=1e-5, atol=1e-5)
    assert not [*(tmp_path / "out").glob("adapter*")]
    assert front_matter(tmp_path / "out")["base_model_relation"] == "finetune"
    stops = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert stops["eos_token_id"] == 0


def test_an_adapter_of_a_model_with_other_weights_is_refused(project, call, tmp_path):
    shutil.copytree(checkpoint(project, "adapted", 20), tmp_path / "own")
    path = tmp_path / "own/training/state.json"
    state = json.loads(path.read_text())
    state["identity"]["base"] = "ab" * 8
    path.write_text(json.dumps(state))
    publish_again(tmp_path / "own")
    with pytest.raises(ConfigError, match="has other weights than the adapter learned beside"):
        call(tmp_path / "own", "--to", tmp_path / "out", "--merge")


def test_a_bare_model_or_adapter_needs_no_export(call, tmp_path):
    call("adapted", "--to", tmp_path / "bare")
    with pytest.raises(
        ConfigError, match="bare has no training/state.json, so it is no checkpoint"
    ):
        call(tmp_path / "bare", "--to", tmp_path / "out", "--merge")


def test_an_adapter_whose_model_is_not_here_is_refused(project, tmp_path, monkeypatch):
    own = shutil.copytree(checkpoint(project, "adapted", 20), tmp_path / "own")
    arguments, due = [str(own), "--to", str(tmp_path / "out")], "model org/base, .* cannot be read"
    with pytest.raises(ConfigError, match=f"{due} .*; run: bash download_data_model.sh model.name"):
        command.main([*arguments, "--home", str(tmp_path)])
    monkeypatch.delenv("TRAINSTACK_HOME", raising=False)
    with pytest.raises(ConfigError, match="model is in a project; name that with --home"):
        command.main(arguments)


def test_weights_beyond_a_type_and_a_disk_that_is_too_small_are_said(project, call, tmp_path):
    own = shutil.copytree(checkpoint(project, "r", 20), tmp_path / "own")
    weights = load_file(own / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    publish_again(own)
    with pytest.raises(ConfigError, match="model.norm.weight has values beyond .*--dtype bf16"):
        call(own, "--to", tmp_path / "out", "--dtype", "fp16")
    with pytest.raises(Failed, match="it needs .* TB, and .* are free at .*; free"):
        files.check_space(tmp_path, 1 << 60)
    assert [*tmp_path.iterdir()] == [own]


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_the_card_tells_what_the_model_learned_from_how_and_how_well(project, call, tmp_path):
    call("r", "--to", tmp_path / "out")
    head, text = front_matter(tmp_path / "out"), (tmp_path / "out/README.md").read_text()
    assert head["base_model"] == "org/base" and head["datasets"] == ["org/data"]
    assert "license" not in head
    assert f"(https://huggingface.co/org/base), commit {COMMIT[:12]}" in text
    assert f"(https://huggingface.co/datasets/org/data), commit {COMMIT[::-1][:12]}" in text
    measured = tiny.metrics(project, "r", "eval_loss")[20]
    assert f"loss {measured:.4f}, perplexity " in text and " bits per byte." in text
    assert "20 steps = 160 samples, repeated = 0, skipped = 0." in text
    assert "20 steps on 5,120 tokens" in text and "| `optim.learning_rate` | 0.01 |" in text


def test_nothing_of_this_machine_or_its_people_is_in_an_export(project, call, tmp_path):
    for name, options in (("r", []), ("chat", []), ("adapted", []), ("adapted", ["--merge"])):
        target = tmp_path / f"{name}{len(options)}"
        call(name, "--to", target, *options)
        for path in [path for path in target.rglob("*") if path.is_file()]:
            held = path.read_bytes()
            for secret in (project, Path.home(), tmp_path, tiny.ROOT, "./chat"):
                assert str(secret).encode() not in held, f"{path.name}: {secret}"
            host = rf"\b{re.escape(os.uname().nodename)}\b".encode()
            assert path.suffix == ".safetensors" or not re.search(host, held), path.name
    assert "- chats (train)" in (tmp_path / "chat0/README.md").read_text()
    assert not {"base_model", "datasets"} & front_matter(tmp_path / "chat0").keys()


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["nobody"], "no run nobody in"),
        (["r@7"], "run r has no checkpoint 7; it has steps 10, 15, 20"),
        (["r@best"], "run r has no best checkpoint (eval.keep_best); it has steps"),
        (["r", "--merge"], "is no adapter, so --merge has nothing to merge"),
        (["adapted", "--dtype", "bf16"], "leave it out, or add --merge"),
        (["r", "--private"], "add --push ORG/NAME"),
        (["r", "--push", "mine"], "is no name of a repository"),
        (["r", "--push", "org/mine"], "there is no token to push with"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_exported_is_said_in_a_line_before_anything_is_loaded(
    call, tmp_path, monkeypatch, arguments, problem
):
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=re.escape(problem)) as error:
        call(*arguments, "--to", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_best_checkpoint_and_a_checkpoints_folder_can_be_named(project, call, tmp_path):
    link = checkpoint(project, "r", 15).parent / "best"
    link.symlink_to("checkpoint-15")
    try:
        assert "checkpoint-15, whole" in call("r@best", "--to", tmp_path / "a")[0]
    finally:
        link.unlink()
    assert "is this export already" in call(checkpoint(project, "r", 15), "--to", tmp_path / "a")[1]


def test_of_a_run_that_is_not_done_the_newest_checkpoint_is_taken_and_said(project, tmp_path, call):
    status = layout.run_folder(project, "r") / "status.json"
    before = status.read_bytes()
    status.write_text(json.dumps(json.loads(before) | {"state": "PAUSED"}))
    try:
        assert call("r", "--to", tmp_path / "out")[0].endswith("whole; the run is PAUSED")
    finally:
        status.write_bytes(before)


def test_a_damaged_checkpoint_is_refused_and_another_asked_for(project, call, tmp_path):
    shutil.copytree(layout.run_folder(project, "r"), layout.run_folder(project, "bad"))
    path = checkpoint(project, "bad", 20) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        Failed, match="model.safetensors: hash differs.; name another one, as RUN@STEP"
    ):
        call("bad", "--to", tmp_path / "out")


def test_only_an_earlier_export_is_replaced(call, tmp_path):
    target = tmp_path / "out"
    call("r@15", "--to", target)
    assert "it replaces the export of run r at step 15 in fp32" in call("r", "--to", target)[-1]
    assert "at step 20 " in (target / "README.md").read_text()
    (target / "README.md").write_text("edited")
    assert "is this export already" in call("r", "--to", target)[-1]
    assert (target / "README.md").read_text() == "edited"
    assert "README.md was edited, so it stays as it is" in call("r@15", "--to", target)[-1]
    assert (target / "README.md").read_text() == "edited"
    (target / "README.md").unlink()
    call("r@15", "--to", target)
    assert "at step 15 " in (target / "README.md").read_text()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="and notes.txt in it is somebody's own; move that away"):
        call("r", "--to", target)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a").touch()
    with pytest.raises(ConfigError, match="is there already, and is no export"):
        call("r", "--to", other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_an_export_whose_swap_was_killed_is_there_again(call, tmp_path):
    target = tmp_path / "out"
    call("r", "--to", target)
    target.rename(tmp_path / ".out.old")  # and killed before the new one got the name
    assert "is this export already" in call("r", "--to", target)[-1]
    assert [*tmp_path.iterdir()] == [target]


def test_a_full_disk_leaves_nothing_and_says_where_to(call, tmp_path):
    def full(operation, path, _):
        if operation == "write" and path.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "full", str(path))

    with files.watched_by(full), pytest.raises(Failed, match="full at .*; free some space or name"):
        call("r", "--to", tmp_path / "out")
    assert not [*tmp_path.iterdir()]


# To the Hub


@pytest.fixture
def server(tmp_path):
    (tmp_path / "root" / "models").mkdir(parents=True)
    with HubServer(tmp_path / "root") as running:
        running.tokens.add(TOKEN)
        yield running


@pytest.fixture(scope="module")
def made(project, tmp_path_factory):
    """The export of ``r``, made once."""
    folder = tmp_path_factory.mktemp("made") / "out"
    export(find_source("r", project), folder, Way("fp32", False), print)
    return folder


@pytest.fixture
def push(project, server, made, tmp_path):
    """Push in a process of its own, whose environment is the server's; its lines."""
    shutil.copytree(made, tmp_path / "out")
    hidden = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    hidden |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}

    def run_it(*arguments, code: int = 0, **variables) -> list[str]:
        call = [sys.executable, "-m", "trainstack", "export", *arguments, "--home", project]
        done = subprocess.run(
            [*map(str, call), "--to", tmp_path / "out", "--push", "org/mine"],
            capture_output=True, text=True, cwd=tiny.ROOT, env=hidden | variables,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        lines = done.stderr.splitlines()
        assert all(line.startswith("export: ") for line in lines), done.stderr
        return lines

    return run_it


def export_to(folder: Path, project: Path, name: str, **way) -> None:
    """In this process, where all is imported, so that a push finds it there."""
    shutil.rmtree(folder)
    export(find_source(name, project), folder, Way("fp32", False, **way), print)


def content(folder: Path) -> dict[str, str]:
    """The hash of each file that a push brings."""
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    hidden = (".gitattributes", ".cache")
    return {n: manifest.hash_file(folder / n)["sha256"] for n in names if not n.startswith(hidden)}


def test_a_pushed_chat_is_downloaded_again_the_same_answers_and_stops(
    push, project, server, tmp_path
):
    export_to(tmp_path / "out", project, "chat")
    assert "have the hashes of" in push("chat", "--private")[-1]
    assert "org/mine" in server.private
    code = "from huggingface_hub import *; snapshot_download('org/mine', local_dir='again')"
    variables = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    variables = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | variables
    subprocess.run([sys.executable, "-c", code], env=variables, check=True, cwd=tmp_path)
    assert content(tmp_path / "again") == content(tmp_path / "out")
    model, words = load(tmp_path / "again"), AutoTokenizer.from_pretrained(tmp_path / "again")
    asked = words.apply_chat_template(
        [{"role": "user", "content": "one"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    ids = model.generate(**asked, max_new_tokens=30, do_sample=False)[0]
    assert words.decode(ids[asked["input_ids"].shape[1] :]) == "three four <|end|>"


def test_an_interrupted_push_continues_and_sends_nothing_twice(push, server, project, tmp_path):
    export_to(tmp_path / "out", project, "r", shard_bytes=40_000)
    server.faults.append({"path": "PUT /lfs/", "kind": 400})
    assert "did not take all of it (HTTP 400); what has arrived" in push("r", code=1)[-1]
    server.faults.append({"path": "POST /api/models/org/mine/commit", "kind": 403})
    assert "refuses your token (HTTP 403); set HF_TOKEN to" in push("r", code=2)[-1]
    lines, there = push("r"), server.root / "models/org/mine"
    assert "is this export already" in lines[1] and "have the hashes of" in lines[-1]
    assert content(there) == content(tmp_path / "out")
    sent = [request.path for request in server.requests if request.method == "PUT"]
    assert len(sent) == 1 + len({*sent}) > 3  # the one that was refused came again
    export_to(tmp_path / "out", project, "r@15")
    push("r@15")
    assert [path.name for path in there.glob("*.safetensors*")] == ["model.safetensors"]
    assert content(there) == content(tmp_path / "out")


def test_a_push_of_a_model_over_an_adapter_leaves_no_adapter(push, server, project, tmp_path):
    export_to(tmp_path / "out", project, "adapted")
    push("adapted")
    assert (server.root / "models/org/mine/adapter_config.json").exists()
    (server.root / "models/org/mine/notes.txt").write_text("somebody's own")
    export_to(tmp_path / "out", project, "r")
    lines = push("r")
    assert "adapter_config.json of an earlier export is removed" in "".join(lines)
    here = {"notes.txt", *content(tmp_path / "out")}
    assert content(server.root / "models/org/mine").keys() == here


def test_a_card_that_people_edited_on_the_hub_stays(push, server, project, tmp_path):
    push("r")
    card = server.root / "models/org/mine/README.md"
    card.write_text("license: apache-2.0, " + card.read_text())
    export_to(tmp_path / "out", project, "r@15")
    assert "its README.md was edited and stays; remove it there" in "".join(push("r@15"))
    assert card.read_text().startswith("license: apache-2.0, ")
    card.write_text((tmp_path / "out/README.md").read_text())
    export_to(tmp_path / "out", project, "r")
    push("r")
    assert card.read_text() == (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    "rule, code, problem",
    [
        (("POST /api/repos/create", 401), 2, "refuses your token (HTTP 401)"),
        (("POST /api/repos/create", 404), 2, "the Hub knows no org, or not to your token"),
        (("POST /api/repos/create", "down"), 1, "did not take all of it (Remote"),
        (("GET /api/models/org/mine/tree", 429), 1, "(HTTP 429 (too many requests)); what has"),
        (("PUT /lfs/", "wrong_bytes"), 1, "has other bytes than"),
    ],
    ids=lambda value: str(value[1]) if isinstance(value, tuple) else "",
)
def test_what_keeps_a_push_from_its_end_is_said_in_a_line(push, server, rule, code, problem):
    server.faults.append({"path": rule[0], "kind": rule[1], "times": 9})
    assert problem in push("r", code=code)[-1]


def test_a_card_that_the_hub_does_not_take_is_said_with_the_reason(push, tmp_path):
    path = tmp_path / "out/README.md"
    path.write_text(path.read_text().replace("tags:", "license: mine\ntags:"))
    assert (
        'in README.md. - "license" must be one of [apache-2.0, mit]); correct it'
        in (push("r", code=2)[-1])
    )


def test_a_repository_of_something_else_is_left_alone(push, server, tmp_path):
    there = server.root / "models/org/mine"
    there.mkdir(parents=True)
    (there / "model.gguf").touch()
    assert "has files that are no export, such as model.gguf; name another" in push("r", code=2)[-1]
    (there / "model.gguf").unlink()
    assert "is there already and public; make it private at" in push("r", "--private", code=2)[-1]
    assert [*there.iterdir()] == []


def test_with_nobody_there_a_push_says_so_and_keeps_the_export(push, tmp_path):
    lines = push("r", code=1, HF_ENDPOINT="http://127.0.0.1:9")
    assert "did not take all of it (ConnectError" in lines[-1]
    assert manifest.is_whole(tmp_path / "out")
    assert "HF_HUB_OFFLINE forbids" in push("r", code=2, HF_HUB_OFFLINE="1")[-1]
