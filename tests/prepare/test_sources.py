"""Files of any type and size become the documents that they hold; what is held out of them."""

import gzip
import json
import pickle

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet
import pytest
from records import TEMPLATE

import tiny
from trainstack.__main__ import main
from trainstack.config.load import load
from trainstack.data import writer
from trainstack.data.store import TokenStore, store_folder
from trainstack.errors import DataError
from trainstack.prepare.formats import to_documents
from trainstack.prepare.held_out import is_held_out
from trainstack.records import chunks
from trainstack.records.chunks import Wanted
from trainstack.records.columns import columns_read
from trainstack.records.readers import is_readable, read_chunks
from trainstack.storage import layout, manifest

LINES = [f"w{n % 64} " + " ".join(tiny.WORDS[: n % 9 + 1]) for n in range(3000)]
FRACTION = 0.1


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.make_model(folder, template=TEMPLATE)
    return folder / "models"


@pytest.fixture
def home(models, tmp_path):
    (tmp_path / "models").symlink_to(models)
    return tmp_path


def make(home, content: dict[str, str], *settings, code: int = 0) -> TokenStore:
    """The store of a data set with these files."""
    folder = layout.dataset_folder(home, "own", None)
    manifest.remove_folder(folder)
    tiny.publish(folder, content, kind="dataset")
    path = tiny.write_config(home, data__name="own", data__eval_fraction=FRACTION)
    common = ["--home", str(home), "--config", str(path), "--processes", "1"]
    assert main(["prepare", *common, *settings]) == code
    config = load(path, [*settings])
    if code == 0:
        return TokenStore(store_folder(home, "tiny", config.data), 32)


def documents(split) -> list[list[int]]:
    """The ids of each document of a split."""
    return [part.tolist() for part in np.split(split.ids, split.stops)[:-1]]


def ids_of(text: str) -> list[int]:
    known = {tiny.END: 0, **{word: i + 1 for i, word in enumerate(tiny.WORDS)}}
    known |= {f"w{i}": len(tiny.WORDS) + 1 + i for i in range(64)}
    return [known[word] for word in text.split()]


def on_side(is_wanted: bool) -> str:
    """A text of many lines that its hash holds out, or not."""
    more = (f"w{n % 64} w{n // 64}" for n in range(4096))
    texts = ("\n".join([*LINES, last]) for last in more)
    return next(text for text in texts if is_held_out(text, FRACTION) == is_wanted)


@pytest.fixture(params=[1 << 20, 5000], ids=["at once", "in pieces"])
def pieces(request, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("is_unlucky", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_of_one_document_the_end_is_held_out_from_a_line_on(home, capsys, pieces, is_unlucky, name):
    text = on_side(is_unlucky)
    content = text if name == "a.txt" else json.dumps({"text": text}) + "\n"
    store = make(home, {name: content})
    [train], [held_out] = documents(store.train), documents(store.eval)
    assert train + held_out == [*ids_of(text), 0], "ended once, behind the whole"
    words = np.cumsum([len(line.split()) for line in LINES]).tolist()
    rest = words.index(len(train)) + 1  # else it was not cut at the end of a line
    share = len("\n".join(LINES[rest:])) / len(text)
    assert FRACTION <= share < FRACTION * 1.01
    said = capsys.readouterr().err
    assert "one document only" in said and "data.eval_fraction" in said and "data.split_on" in said


def test_a_line_that_is_far_too_long_is_cut_at_a_space(home):
    text = next(
        t for n in range(99) if not is_held_out(t := f"w{n}\n" + " ".join(["one"] * 1000), FRACTION)
    )
    store = make(home, {"a.txt": text})
    [train], [held_out] = documents(store.train), documents(store.eval)
    assert train + held_out == [*ids_of(text), 0]
    assert len(held_out) == 102, "a tenth of the words, up to the space before, and the end"


def test_of_one_conversation_whose_turns_are_samples_nothing_is_held_out(home, capsys):
    said = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "one two")]
    messages = [{"role": role, "content": content} for role, content in said]
    store = make(home, {"a.jsonl": json.dumps({"messages": messages})}, "data.each_turn=true")
    assert (store.counts.train_documents, store.counts.eval_documents) == (2, 0)
    assert "one document only" in capsys.readouterr().err


def test_a_bad_part_of_a_long_text_ends_the_preparation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 5000)
    folder = tiny.make_model(tmp_path)
    content = {path.name: path.read_text() for path in folder.glob("*okeniz*.json")}
    manifest.remove_folder(folder)
    content["config.json"] = json.dumps({**tiny.CONFIG, "vocab_size": 74})  # one token fewer
    tiny.publish(folder, content, kind="model", weight_bytes=0)
    text = "\n".join([*LINES, "w63", *LINES])
    make(tmp_path, {"a.txt": text}, "data.max_bad_records=99", code=1)
    assert "prepare: error: a.txt: holds w63, token 74 of a model" in capsys.readouterr().err


def test_a_row_of_csv_with_a_comma_too_many_is_no_shorter_text(home, capsys):
    make(home, {"a.csv": "text\none two\none, two\n"}, code=1)
    assert "a.csv: row 2: not readable (it has more fields" in capsys.readouterr().err


def test_of_several_texts_of_which_none_would_be_held_out_the_end_is(home, capsys):
    texts = [t for n in range(99) if not is_held_out(t := f"w{n} " + "one\n" * 50, FRACTION)][:3]
    store = make(home, {f"{n}.txt": text for n, text in enumerate(texts)})
    assert documents(store.train)[:2] == [[*ids_of(text), 0] for text in texts[:2]]
    whole = documents(store.train)[2] + documents(store.eval)[0]
    assert whole == [*ids_of(texts[2]), 0]
    assert len(documents(store.eval)[0]) == 17, "a tenth of 153 words, at a line's end, and the end"
    assert "of 3 documents the hash would hold out none" in capsys.readouterr().err


def test_of_several_conversations_the_last_is_held_out_and_of_one_nothing(home, capsys):
    turns = [
        [{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": "one two"}]
        for n in range(20)
    ]
    sides = [is_held_out(f"user w{n} assistant one two <|end|> ", FRACTION) for n in range(20)]
    chosen = [turns[n] for n in range(20) if not sides[n]][:3]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in chosen]
    store = make(home, {"a.jsonl": "".join(lines)})
    assert (store.counts.train_documents, store.counts.eval_documents) == (2, 1)
    assert "a.jsonl:3 is held out" in capsys.readouterr().err
    store = make(home, {"a.jsonl": lines[0]})
    assert (store.counts.train_documents, store.counts.eval_documents) == (1, 0)
    assert "no evaluation; add others, or set data.eval_split" in capsys.readouterr().err


def test_where_both_sides_have_documents_the_hash_decides_alone(home, capsys):
    texts = [f"w{n % 64} w{n // 64}" for n in range(200)]
    store = make(home, {"a.jsonl": "".join(json.dumps({"text": t}) + "\n" for t in texts)})
    expected = [[*ids_of(text), 0] for text in texts if is_held_out(text, FRACTION)]
    assert documents(store.eval) == expected
    assert "hash would" not in capsys.readouterr().err


def test_a_long_text_is_on_the_side_of_its_whole(home, pieces):
    for is_wanted in (True, False):
        long = on_side(is_wanted)
        more = {"b.jsonl": "".join(f'{{"text": "w{n} one"}}\n' for n in range(64))}
        store = make(home, {"a.txt": long, **more})
        split, other = (store.eval, store.train) if is_wanted else (store.train, store.eval)
        assert documents(split)[0] == [*ids_of(long), 0]
        assert other.stops[0] == 3


def test_killed_within_a_long_text_it_continues_to_the_same_store(home, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0)
    content = {"a.txt": on_side(False)}
    expected = make(home, content)
    meta = (expected.train.ids.tolist(), documents(expected.eval))
    manifest.remove_folder(expected.folder)

    def is_killed(self, position, record, reached=writer.TokenWriter.reached):
        reached(self, position, record)
        if record == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.TokenWriter, "reached", is_killed)
        with pytest.raises(KeyboardInterrupt):
            make(home, content)
    monkeypatch.setattr(writer, "is_dead", lambda _: True)
    store = make(home, content)
    assert (store.train.ids.tolist(), documents(store.eval)) == meta


@pytest.mark.parametrize(
    ("split_on", "text"),
    [
        ("line", "one two\r\n\n  \nthree\nfour five\n"),
        ("<|endoftext|>", "one two\n<|endoftext|>\nthree<|endoftext|>four five<|endoftext|>\n"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_text_is_divided_where_the_setting_says(home, monkeypatch, split_on, text, name):
    expected = [[1, 2, 0], [3, 0], [4, 5, 0]]
    for size in (1 << 20, 16):
        monkeypatch.setattr(chunks, "CHUNK_BYTES", size)
        content = text if name == "a.txt" else json.dumps({"text": text}) + "\n"
        store = make(home, {name: content}, f"data.split_on={split_on}", "data.eval_fraction=0")
        assert documents(store.train) == expected
        manifest.remove_folder(store.folder)


def test_the_name_of_another_column_is_not_that_of_a_txt(home):
    columns = ["data.columns={text: body}", "data.split_on=line", "data.eval_fraction=0"]
    content = {"a.txt": "one two\nthree\n", "b.jsonl": '{"body": "four\\nfive"}\n'}
    assert documents(make(home, content, *columns).train) == [[1, 2, 0], [3, 0], [4, 0], [5, 0]]


def test_conversations_are_not_divided(home, capsys):
    make(home, {"a.jsonl": '{"messages": []}\n'}, "data.split_on=line", code=2)
    assert "data.split_on: own has no texts but messages" in capsys.readouterr().err


def test_the_pieces_of_a_long_text_give_the_tokens_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 300)
    text = "\ufeff" + "".join(line + "\n" + "é\n" * (n % 3) for n, line in enumerate(LINES[:99]))
    (tmp_path / "a.txt").write_text(text)
    found = list(read_chunks(tmp_path / "a.txt", Wanted(is_one=True)))
    assert len(found) > 5 and "".join(c.content[0]["text"] for c in found) == text[1:]
    parts = [chunk.part for chunk in found]
    assert [part.is_continued for part in parts] == [True] * (len(found) - 1) + [False]
    starts = np.cumsum([0, *(len(c.content[0]["text"]) for c in found[:-1])])
    assert [part.start for part in parts] == starts.tolist()


AS_SHIPPED = load(tiny.ROOT / "config.yaml", []).data
YEAR_10000 = pyarrow.array([0, 253402300800000000], pyarrow.timestamp("us"))


def write_table(path, table, stream: bool = True) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        kind = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
        with kind(str(path), table.schema) as sink:
            sink.write_table(table, max_chunksize=1000)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_a_column_that_nobody_reads_may_hold_anything(tmp_path, kind):
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    table = pyarrow.table({"crawled": YEAR_10000, "text": ["one", "two"]})
    write_table(path, table, kind == "stream")
    [chunk] = read_chunks(path, Wanted(columns_read("auto", AS_SHIPPED)))
    records = [record for _, record in chunk.records()]
    assert records == [{"text": text, "crawled": None} for text in ("one", "two")]
    with pytest.raises(DataError, match=r"no column body; it has: crawled, text; .*text_field"):
        list(read_chunks(path, Wanted({"body"})))


def test_a_row_with_a_value_that_is_read_and_that_python_cannot_hold_is_a_bad_record(tmp_path):
    write_table(tmp_path / "a.parquet", pyarrow.table({"text": YEAR_10000}))
    [chunk] = read_chunks(tmp_path / "a.parquet", Wanted({"text"}))
    [_, (_, second)] = chunk.records()
    assert str(second).startswith("a.parquet: row 2: not readable (")


def test_rows_of_arrow_reach_a_process_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 10_000)
    texts = [f"{n} " * 30 for n in range(3000)]
    write_table(tmp_path / "a.arrow", pyarrow.table({"text": texts, "n": range(3000)}))
    found = list(read_chunks(tmp_path / "a.arrow", Wanted({"text"})))
    assert [r["text"] for chunk in found for _, r in chunk.records()] == texts
    assert all(len(pickle.dumps(chunk)) < 20_000 for chunk in found)
    assert [c.first for c in found] == [1, *(chunk.stop for chunk in found[:-1])]


TEXTS = pyarrow.array(["one", "one", "zwölf"])
COLUMNS = {
    "large": TEXTS.cast(pyarrow.large_string()),
    "view": TEXTS.cast(pyarrow.string_view()),
    "binary": TEXTS.cast(pyarrow.binary()),
    "dictionary": TEXTS.dictionary_encode(),
    "runs": pyarrow.compute.run_end_encode(TEXTS),  # not in parquet
}


@pytest.mark.parametrize(
    "name",
    [f"{c}.{suffix}" for c in COLUMNS for suffix in ("parquet", "arrow")][:-2] + ["runs.arrow"],
)
def test_texts_of_a_table_are_alike_in_every_type(tmp_path, name):
    path = tmp_path / name
    write_table(path, pyarrow.table({"text": COLUMNS[path.stem]}))
    [chunk] = read_chunks(path, Wanted({"text"}))
    made = [to_documents("a", r, "text", AS_SHIPPED, None)[0].text for _, r in chunk.records()]
    assert made == TEXTS.to_pylist()


ONE_LINE = b'{"text": "x"}\n'
POINTLESS = {
    "empty.jsonl": (b"", "empty.jsonl: is empty; fetch it again"),
    "page.jsonl": (b"\n<!DOCTYPE html><html>", "page.jsonl: is a web page or XML; fetch"),
    "page.parquet": (b"<html><body>404</body></html>", "page.parquet: is a web page"),
    "denied.csv": (b'<?xml version="1.0"?><Error>', "denied.csv: is a web page or XML"),
    "zip.jsonl": (b"PK\3\4" + b"\0" * 99, "zip.jsonl: is a zip archive; unpack it"),
    "tar.txt": (b"a.txt".ljust(257, b"\0") + b"ustar", "tar.txt: is a tar archive; unpack it"),
    "plain.jsonl": (
        gzip.compress(ONE_LINE),
        "plain.jsonl: is compressed with gzip; end its name with .gz",
    ),
    "wrong.jsonl.gz": (b"<html>", "wrong.jsonl.gz: is a web page"),
    "not.jsonl.gz": (ONE_LINE, "not.jsonl.gz: is not compressed; take .gz off its name"),
    "not.jsonl.zst": (ONE_LINE, "not.jsonl.zst: is not compressed; take .zst off its name"),
    "other.jsonl.zst": (gzip.compress(ONE_LINE), "is compressed with gzip; end its name with .gz"),
    "cut.arrow": (None, "cut.arrow: .*fetch it again"),
    "no-end.arrow": (None, r"no-end.arrow: not a whole arrow file \(it has no end\)"),
    "text.arrow": (ONE_LINE * 9, "text.arrow: "),
    "footer.parquet": (b"PAR1" + b"\xff" * 99 + b"PAR1", "footer.parquet: .*fetch it again"),
    "data.parquet": (None, "data.parquet: .*fetch it again"),
    "wide.csv": ("text\none\n".encode("utf-16"), "wide.csv: not UTF-8 at byte 0; convert"),
    "object.json": (b'{\n "data": []\n}', "object.json: one object over several lines; write"),
    "last.jsonl": (ONE_LINE + b'{"text": "y', "last.jsonl:2: Unterminated string"),
    "late.txt": (b"one two\n" * 999 + b"\xff", "late.txt: not UTF-8 at byte 7992; convert"),
    "nul.txt": (b"one two\n" * 999 + b"\0", "nul.txt: NUL character at 7,992"),
}


@pytest.mark.parametrize("name", POINTLESS)
def test_a_damaged_file_is_named_with_the_place_and_what_to_do(tmp_path, monkeypatch, name):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    content, message = POINTLESS[name]
    path = tmp_path / name
    if content is None:
        table = pyarrow.table({"text": [f"{n} two three" for n in range(3000)]})
        write_table(path, table)
        whole = bytearray(path.read_bytes())
        if path.suffix == ".parquet":
            whole[100:2000] = b"\xff" * 1900
        content = whole[: {"cut.arrow": -900, "no-end.arrow": -8}.get(name)]
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        for chunk in read_chunks(path, Wanted({"text"}, is_one=True)):
            for _, record in chunk.records():
                if isinstance(record, DataError):
                    raise record


def test_a_table_without_columns_is_named(tmp_path):
    write_table(tmp_path / "a.parquet", pyarrow.table({}))
    with pytest.raises(DataError, match=r"a\.parquet: it has no columns; take it away"):
        list(read_chunks(tmp_path / "a.parquet", Wanted({"text"})))


def test_frames_that_follow_each_other_are_all_read_and_what_is_too_wide_is_named(tmp_path):
    frames = []
    for text in ("one", "two"):
        with pyarrow.BufferOutputStream() as sink:
            with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(f'{{"text": "{text}"}}\n'.encode())
            frames.append(sink.getvalue().to_pybytes())
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(ONE_LINE) * 2)
    for name in ("a.jsonl.zst", "b.jsonl.gz"):
        [chunk] = read_chunks(tmp_path / name)
        assert len(list(chunk.records())) == 2
    # A frame without its content: no single segment, a window of 2^(10 + 21) bytes.
    (tmp_path / "c.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\0" + bytes([21 << 3]) + b"\0" * 9)
    with pytest.raises(DataError, match="c.jsonl.zst: .*unpack it first: zstd -d --long=31 c.json"):
        list(read_chunks(tmp_path / "c.jsonl.zst"))


def test_names_are_read_whatever_their_case(tmp_path):
    (tmp_path / "A.TXT").write_text("one")
    [chunk] = read_chunks(tmp_path / "A.TXT")
    assert chunk.content == [{"text": "one"}]
    assert is_readable("b.JSONL.gz") and not is_readable("c.xlsx")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'id,text\n1,"a"\n2,"He said "no" twice"\n', "a.csv:3: "),
        ("a.csv", 'id,text\n1,a\n2,"a quote left open\n3,b\n', "a.csv:3: "),
        ("a.csv", "text,id,text\na,1,b\n", "a.csv: two columns are called text"),
        ("a.jsonl", '{"text": "a"}\n{"text": "a", "text": "b"}\n', "a.jsonl:2: the key text"),
        ("a.json", '[{"text": "a"},\n {"b": 1, "b": 2}]', "a.json:2: the key b is repeated"),
    ],
)
def test_what_readers_take_in_two_ways_is_named_with_its_line(home, capsys, name, content, message):
    make(home, {name: content}, code=1)
    assert f"error: {message}" in capsys.readouterr().err


def test_columns_without_a_name_may_be_several(home):
    content = ",,text\n" + "".join(f"{n},{n},one w{n}\n" for n in range(40))
    assert make(home, {"a.csv": content}).counts.train_documents > 30
