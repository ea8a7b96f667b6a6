"""Preparation: in parallel, killed at any moment and continued, in memory that does not grow."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet
import pytest
from records import TEMPLATE

import tiny
from trainstack.errors import DataError
from trainstack.records import chunks, readers
from trainstack.storage import layout, manifest

# A preparation of many small chunks, each committed, by several processes.
DRIVER = """
import sys
from trainstack.__main__ import hide_torch, main
hide_torch()
from trainstack.data import writer
from trainstack.prepare import prepare, tokenise
from trainstack.records import chunks
chunks.CHUNK_BYTES, prepare.FEW_BYTES, writer.COMMIT_SECONDS = {chunk}, 0, 0
{more}
sys.exit(main(["prepare", *sys.argv[1:]]))
"""
SLOWLY = """
import time
work = tokenise.Tokeniser.__call__
def slowly(self, task):
    time.sleep(0.02)
    return work(self, task)
tokenise.Tokeniser.__call__ = slowly
"""


PEAK = """
import atexit, resource  # RUSAGE_SELF would count the process that began this one
def peak():
    own = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]
    return max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
atexit.register(lambda: print(peak(), file=sys.stderr))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.make_model(folder, template=TEMPLATE)
    generator = random.Random(1)
    content = {}
    for name in ("a.jsonl", "b.jsonl"):
        lines = []
        for number in range(400):
            asked, said = (" ".join(generator.choices(tiny.WORDS, k=9)) for _ in range(2))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            lines.append(json.dumps({"messages": turns}) if number % 9 else '{"messages": 7}')
        content[name] = "\n".join(lines) + "\n"
    tiny.publish(layout.dataset_folder(folder, "chats", None), content, kind="dataset")
    tiny.make_dataset(folder, "texts", 800)
    tiny.write_config(folder, data__max_bad_records=200)
    return folder


def command(home, *arguments, chunk: int = 2000, more: str = "") -> list[str]:
    code = DRIVER.format(chunk=chunk, more=more)
    where = ["--home", home, "--config", home / "config.yaml"]
    return [sys.executable, "-c", code, *map(str, where), *arguments]


def run(home, *arguments, code: int = 0, **options) -> str:
    """Prepare to the end; what was said."""
    done = subprocess.run(command(home, *arguments, **options), capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stderr


def stores(home) -> dict[str, dict]:
    """The files of each store with their hashes, without meta.json."""
    found = {}
    for folder in (home / "tokens").iterdir():
        entries = manifest.read_manifest(folder)["files"]
        assert not list(manifest.damage(folder))
        found[folder.name] = {n: e["sha256"] for n, e in entries.items() if n != "meta.json"}
    return found


@pytest.fixture(scope="module")
def expected(home):
    """What one process makes of both data sets without a stop."""
    made = {}
    for name, format in (("chats", "messages"), ("texts", "text")):
        settings = [f"data.name={name}", "data.packing=best_fit"]
        said = run(home, *settings, "--processes", "1", chunk=1 << 20)
        assert f"documents ({format})" in said
        made[name] = stores(home)
        shutil.rmtree(home / "tokens")
    assert any("bad_records.jsonl" in entries for entries in made["chats"].values())
    return made


@pytest.fixture(autouse=True)
def no_store(home):
    """Each test makes its own, in the folder that they share."""
    yield
    shutil.rmtree(home / "tokens", ignore_errors=True)


@pytest.mark.parametrize("name", ["chats", "texts"])
def test_several_processes_make_what_one_makes(home, expected, name):
    run(home, f"data.name={name}", "data.packing=best_fit", "--processes", "3")
    assert stores(home) == expected[name]
    assert "; are here" in run(home, f"data.name={name}", "data.packing=best_fit")


def test_killed_again_and_again_it_continues_and_ends_as_if_nothing_had_happened(home, expected):
    generator, kept = random.Random(4), []
    arguments = ["data.name=texts", "data.packing=best_fit", "--processes", "2"]
    for _ in range(5):
        process = subprocess.Popen(
            command(home, *arguments, more=SLOWLY), stderr=subprocess.PIPE, text=True
        )
        before = max(progress(home), [0, 1])
        until = time.monotonic() + 60
        while progress(home) <= before and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(generator.random() / 10)
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[1]
        kept.append(progress(home))
        assert not [pid for pid in workers if is_left(pid)], "processes outlive their parent"
        if before > [0, 1]:
            assert "continues at record" in said, said
    assert kept == sorted(kept) and kept[0] > [0, 1] and kept[-1] > kept[0]
    run(home, *arguments)
    assert stores(home) == expected["texts"]  # nothing else is left in the folder either


KILL = "os.kill(os.getpid(), 9)"
MOMENTS = {
    "laying out": f"prepare.packing.plans = lambda *_: {KILL}",
    "meta.json": f"writer.TokenWriter.publish = lambda *_: {KILL}",
    "the rename": f"writer.manifest.publish_folder = lambda *_, **__: {KILL}",
    "after the rename": f"prepare.describe = lambda *_: {KILL}",
    "before the first commit": f"writer.TokenWriter._commit = lambda *_: {KILL}",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_other_moment_it_continues_too(home, expected, moment):
    arguments = ["data.name=chats", "data.packing=best_fit", "--processes", "1"]
    run(home, *arguments, code=-9, more=f"import os\n{MOMENTS[moment]}", chunk=1 << 20)
    said = run(home, *arguments)
    is_kept = moment in ("laying out", "meta.json", "the rename")
    assert ("continues at record" in said) == is_kept
    assert stores(home) == expected["chats"]


@pytest.mark.parametrize("damage", ["torn", "short", "none"])
def test_what_cannot_be_continued_is_started_again(home, expected, damage):
    arguments = ["data.name=texts", "data.packing=best_fit", "--processes", "1"]
    run(home, *arguments, code=-9, more=f"import os\n{MOMENTS['laying out']}")
    (left,) = (home / "tokens").glob(".*")
    if damage == "torn":
        (left / "progress.json").write_text('{"posi')
    elif damage == "none":
        (left / "progress.json").unlink()
    else:
        os.truncate(left / "train.bin", 10)
    said = run(home, *arguments)
    assert ("cannot be continued" in said) == (damage == "short")
    assert ("starting again" in said) == (damage == "short")
    assert stores(home) == expected["texts"]


def test_a_data_set_of_which_every_document_is_too_long_is_no_traceback(home):
    settings = ["data.name=texts", "data.packing=best_fit", "data.too_long=drop", "data.seq_len=8"]
    said = run(home, *settings)
    assert "0 samples of 8 tokens" in said


def test_files_without_a_record_are_named_and_the_others_read(tmp_path):
    tiny.make_model(tmp_path)
    rows = "text\n" + "one two three\n" * 40
    content = {"a.csv": "text\n", "b.csv": rows, "c.json": "[]", "d.csv": rows}
    tiny.publish(layout.dataset_folder(tmp_path, "some", None), content, kind="dataset")
    where = ["--home", tmp_path, "--config", tiny.write_config(tmp_path, data__name="some")]
    told = tiny.run_command("prepare", *where, "data.eval_fraction=0").stderr
    assert "prepare: some: 2 files have no record, first a.csv" in told
    assert "80 documents (text)" in told


def test_no_process_at_all_is_refused(home):
    assert "at least one has to tokenise" in run(home, "--processes", "0", code=2)


def test_it_does_without_torch(tmp_path, monkeypatch):
    """Which takes longer to import than a small data set to tokenise."""
    tiny.make_model(tmp_path)
    tiny.make_dataset(tmp_path)
    config = tiny.write_config(tmp_path)
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    told = tiny.run_command("prepare", "--home", tmp_path, "--config", config).stderr
    imported = set(re.findall(r"\| +([\w.]+)$", told, re.MULTILINE))
    assert "transformers" in imported and "torch" not in imported
    assert "PyTorch" not in told


def test_ctrl_c_is_one_line(home):
    process = subprocess.Popen(
        command(home, "data.name=texts", more=SLOWLY), stderr=subprocess.PIPE, text=True
    )
    while not list(home.glob("tokens/.*/progress.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.splitlines()[-1] == "prepare: stopped; run it again, it continues where it stopped"
    assert "Traceback" not in said


def progress(home) -> list[int]:
    """How far the furthest preparation has come."""
    found = [[]]
    for path in home.glob("tokens/.*/progress.json"):
        try:
            found.append(json.loads(path.read_bytes())["position"])
        except FileNotFoundError:  # taken over at this moment
            continue
    return max(found)


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def is_left(pid: int) -> bool:
    """Whether a process still runs after two seconds."""
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return False
        except (FileNotFoundError, ProcessLookupError):
            return False
        time.sleep(0.02)
    return True


def test_a_process_that_is_killed_for_memory_is_one_line_and_costs_nothing(home, expected):
    dying = """
import os, signal
if not os.path.exists(sys.argv[2] + "/died"):
    work = tokenise.Tokeniser.__call__
    def dies(self, task):
        if task[1].first > 100:
            open(sys.argv[2] + "/died", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return work(self, task)
    tokenise.Tokeniser.__call__ = dies
"""
    arguments = ["data.name=chats", "data.packing=best_fit", "--processes", "2"]
    said = run(home, *arguments, code=1, more=dying).splitlines()
    (error,) = (line for line in said if "error" in line)
    assert "was killed, most likely for lack of memory; run it again with fewer than" in error
    assert "Traceback" not in "".join(said)
    assert "continues at record" in run(home, *arguments)
    assert stores(home) == expected["chats"]


def test_a_disk_that_is_full_is_one_line_with_what_to_do(home):
    full = """
def full(*_):
    raise OSError(28, "No space left on device", "a/train.bin")
writer.Column._flush = full
"""
    said = run(home, "data.name=texts", code=1, more=full).splitlines()
    problem = "the disk or your quota is full at a/train.bin; free some space or move SHARED_DIR"
    assert said[-1] == f"prepare: error: {problem}"
    assert "Traceback" not in "".join(said)


def test_peak_memory_does_not_grow_with_the_data(tmp_path):
    """Forty times the data, ten per cent at most; benchmarks/memory.py goes from 10 MB to 1 GB."""
    tiny.make_model(tmp_path)
    tiny.write_config(tmp_path)
    line = json.dumps({"text": " ".join(tiny.WORDS * 20)}) + "\n"
    peaks = []
    for name, megabytes in (("small", 1), ("large", 40)):
        content = {"train.jsonl": line * (megabytes * 1_000_000 // len(line))}
        tiny.publish(layout.dataset_folder(tmp_path, name, None), content, kind="dataset")
        said = run(tmp_path, f"data.name={name}", "--processes", "2", chunk=1 << 16, more=PEAK)
        peaks.append(int(said.splitlines()[-1]))
    assert peaks[1] <= 1.1 * peaks[0], peaks


VALUES = [
    [],
    [1],
    [{"a": "x" * 50}, {"b": [1, {"c": "]"}]}],
    ["\u2028", "\\", '"', "é"],
    [12, 3.5e7, None],
]


@pytest.mark.parametrize("chunk", [1, 3, 16, 1000])
@pytest.mark.parametrize("values", VALUES, ids=str)
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_value_by_value_as_it_would_be_as_a_whole(
    monkeypatch, chunk, values, indent
):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk)
    text = json.dumps(values, indent=indent, ensure_ascii=False) + "\n"
    found = readers.JsonArray("a.json", io.StringIO(text))
    assert [value for value, _ in found] == values


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1},\n{"a" 2}]', "a.json:2: Expecting ':' delimiter; fix the file"),
        ('[{"a": 1}\n\n{"a": 2}]', "a.json:3: expecting ','; fix the file"),
        ('[{"a": 1},\n', "a.json:2: "),
        ('[{"a": 1}]\n[2]', "a.json:2: more after the end of the array"),
        ('[{"a": 1},\n]', "a.json:2: Expecting value"),
        ("[" * 99_999, "a.json:1: maximum recursion"),
        ("[1" + "0" * 9999 + "]", "a.json:1: Exceeds the limit"),
    ],
)
def test_what_is_no_array_is_named_with_its_line(monkeypatch, chunk, text, problem):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk)
    with pytest.raises(DataError) as raised:
        list(readers.JsonArray("a.json", io.StringIO(text)))
    assert problem in str(raised.value)


def test_a_chunk_can_begin_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 100)
    texts = [f"text {number}" for number in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), tmp_path / "b.parquet", row_group_size=9
    )
    (tmp_path / "c.csv").write_text("text\n" + "\n".join(texts) + "\n")
    (tmp_path / "d.json").write_text(json.dumps([{"text": text} for text in texts]))
    for path in sorted(tmp_path.iterdir()):
        whole = list(readers.read_chunks(path))
        assert len(whole) > 3
        for start in range(1, 52):
            rest = [chunk.from_record(start) for chunk in whole]
            found = [r["text"] for chunk in rest if chunk for _, r in chunk.records()]
            assert found == texts[start - 1 :], (path.name, start)
