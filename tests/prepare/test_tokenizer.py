"""Texts become the ids that transformers gives for them, also long ones and written-out tokens."""

import base64
import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, UnigramTrainer

import tiny
from trainstack.errors import ConfigError
from trainstack.prepare import long_texts
from trainstack.prepare import tokenizer as module
from trainstack.prepare.formats import Document
from trainstack.storage import layout

SOURCE = Path(tiny.__file__).read_text()
BEGIN, END, TURN, THINK = "<s>", "</s>", "<|turn|>", "<think>"


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return trained(made, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def split_digits():
    """As Llama 3's: digits in groups of three."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+(?!\S)| ?[^\s\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return trained(made, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def prepended():
    """As Llama 2's: a space before every text, the whole text one word, bytes for the unknown."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made = trained(made, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)))
    content = {**json.loads(made.to_str()), "pre_tokenizer": None}
    content["added_tokens"] = [t for t in content["added_tokens"] if "<0x" not in t["content"]]
    made = Tokenizer.from_str(json.dumps(content))
    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence(parts)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(parts)
    return made


def first_space():
    """A space before the first word alone, and tokens that take the white space around them."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made = trained(made, "<unk>")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.add_special_tokens([AddedToken(TURN, rstrip=True, lstrip=True, normalized=False)])
    return made


def unigram():
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = UnigramTrainer(
        vocab_size=300, special_tokens=[BEGIN, END, TURN, "<unk>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([SOURCE], trainer)
    made.add_tokens([THINK])
    return made


def trained(made, *special, **options):
    special = [BEGIN, END, TURN, *special]
    trainer = BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False, **options)
    made.train_from_iterator([SOURCE], trainer)
    made.add_tokens([THINK])
    return made


KINDS = {f.__name__: f for f in (byte_level, split_digits, prepended, first_space, unigram)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder for each kind, which puts <s> before a text."""
    home, found = tmp_path_factory.mktemp("home"), {}
    for kind, make in KINDS.items():
        made = make()
        special = [(BEGIN, made.token_to_id(BEGIN))]
        made.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=special)
        found[kind] = model(home, kind, made, bos_token=BEGIN)
    return found


def model(home, name, made, rows=None, **settings):
    rows = rows or made.get_vocab_size()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, **settings}
    content = {
        "config.json": json.dumps({**tiny.CONFIG, "vocab_size": rows}),
        "tokenizer.json": made.to_str(),
        "tokenizer_config.json": json.dumps(settings),
    }
    return tiny.publish(layout.model_folder(home, name), content, kind="model", weight_bytes=0)


@pytest.fixture(params=KINDS)
def folder(request, folders):
    return folders[request.param]


def given(folder, text, **options):
    """What a user of transformers gets."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(text, **options).input_ids


def load_encoder(folder, special_tokens):
    return module.load_encoder(folder.parent.parent, folder.name, special_tokens)


def encoded(encoder, text, learned=None, written=None, is_rendered=False):
    document = Document("a.jsonl:1", text, learned, written, is_rendered)
    [(same, found)] = encoder.encode([document])
    assert same is document
    return found


@pytest.mark.parametrize("text", [SOURCE[:900], "a", " a b", "\n x", "東京 naïve", f"a {THINK} b"])
def test_a_text_has_the_ids_of_inference_and_then_its_end_token(folder, text):
    encoder = load_encoder(folder, None)
    assert encoded(encoder, text).ids.tolist() == [*given(folder, text), encoder.end_id]


@pytest.mark.parametrize("begins", [None, False, True])
@pytest.mark.parametrize("ends", [None, False, True])
def test_what_transformers_adds_by_its_settings_is_there_once(tmp_path, begins, ends):
    settings = {"bos_token": BEGIN, "add_bos_token": begins, "add_eos_token": ends}
    made = byte_level()
    settings = {key: value for key, value in settings.items() if value is not None}
    folder = model(tmp_path, "m", made, **settings)
    found = encoded(load_encoder(folder, None), "one").ids.tolist()
    asked, end = given(folder, "one"), made.token_to_id(END)
    assert found == (asked if asked[-1] == end else [*asked, end])


def test_an_encoder_of_classification_keeps_both_its_sides(tmp_path):
    made = byte_level()
    sides = [(name, made.token_to_id(name)) for name in (BEGIN, TURN)]
    made.post_processor = TemplateProcessing(single=f"{BEGIN} $A {TURN}", special_tokens=sides)
    folder = model(tmp_path, "m", made)
    found = encoded(load_encoder(folder, None), "one", learned=[(0, 3)])
    assert found.ids.tolist() == [*given(folder, "one"), made.token_to_id(END)]
    assert found.flags.tolist() == [False] + [True] * (len(found.ids) - 1)


@pytest.mark.parametrize(
    ("prompt", "answer"), [("Q: one\nA:", " two"), ("def f():\n", "    return x"), ("ab", "cd")]
)
def test_an_answer_is_learned_in_the_ids_of_the_whole(folder, prompt, answer):
    whole = prompt + answer
    found = encoded(load_encoder(folder, None), whole, [(len(prompt), len(whole))])
    assert found.ids[:-1].tolist() == given(folder, whole)
    reached = given(folder, prompt)
    alike = [a == b for a, b in zip(reached, found.ids.tolist(), strict=False)]
    same = alike.index(False) if False in alike else len(reached)
    assert not found.flags[: same - 1].any(), "what comes before the border"
    assert found.flags[len(reached) :].all()
    assert found.flags[-1], "the end token"


def test_a_special_token_that_somebody_wrote_is_text(folders):
    for kind in ("byte_level", "split_digits", "prepended"):
        encoder = load_encoder(folders[kind], None)
        found = encoded(encoder, f"before {END} after {BEGIN}")
        assert found.written == [END, BEGIN]
        assert found.problem is None
        assert found.ids.tolist().count(encoder.end_id) == 1, kind
        assert f"before {END} after" in encoder.tokenizer.decode(found.ids.tolist()), kind


def test_one_that_the_tokenizer_cannot_write_as_text_is_named(folders):
    found = encoded(load_encoder(folders["unigram"], None), f"before {END} after")
    assert f"a.jsonl:1: holds {END}, which this tokenizer cannot write" in found.problem


def test_it_is_a_token_where_that_is_said(folder):
    encoder = load_encoder(folder, "tokens")
    text = f"{BEGIN}one {END}"
    found = encoded(encoder, text)
    inner = given(folder, text, add_special_tokens=False)
    assert inner[-1] == encoder.end_id
    begins = [] if inner[0] == encoder.before[0] else encoder.before
    assert found.ids.tolist() == [*begins, *inner], "nothing is there twice"
    assert found.written == []


@pytest.mark.parametrize("spaces", ["", " ", "\n\n"])
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "unigram"])  # it cannot
def test_a_template_keeps_its_tokens_where_somebody_wrote_the_same(folders, kind, spaces):
    folder = folders[kind]
    encoder = load_encoder(folder, None)
    turn = encoder.tokenizer.token_to_id(TURN)
    begin, end = f"{TURN}{spaces}user\n", f"{spaces}{TURN}{spaces}assistant\nyes  no{END}"
    rendered = begin + "what is it" + end
    plain = encoded(encoder, rendered, [(0, 3)], [], is_rendered=True)
    assert plain.ids.tolist() == given(folder, rendered, add_special_tokens=False)
    said = f"what is {TURN} it"
    text, written = begin + said + end, (len(begin), len(begin) + len(said))
    answer = (text.index("yes"), len(text))
    found = encoded(encoder, text, [answer], [written], is_rendered=True)
    assert found.written == [TURN]
    assert (found.ids == turn).sum() == (plain.ids == turn).sum() == 2
    other = encoded(encoder, begin + "what is | it" + end, [(0, 3)], [], is_rendered=True)
    same = min(len(plain.ids), 9)
    assert found.ids[-same:].tolist() == other.ids[-same:].tolist()
    learned = found.ids[found.flags].tolist()
    assert learned[-1] == encoder.end_id
    assert "yes" in encoder.tokenizer.decode(learned)


def test_the_marks_of_a_template_give_the_ids_of_its_tokens(folder):
    encoder = load_encoder(folder, None)
    for spaces in ("", " ", "  \n"):
        rendered = f"{BEGIN}{TURN}{spaces}user\nwhat{spaces}{TURN}x{END}{spaces}{TURN}"
        document = Document("a", rendered, [(0, 1)], [], True)
        encoder.tokenizer.encode_special_tokens = True
        marked = encoder.tokenizer.encode(encoder._marked(document), add_special_tokens=False)
        found = encoder._marks[1][np.array(marked.ids)].tolist()
        assert found == given(folder, rendered, add_special_tokens=False)


def test_only_an_id_beyond_the_embedding_is_refused(tmp_path):
    made = byte_level()
    rows = made.get_vocab_size()
    made.add_special_tokens(["<image>"])
    folder = model(tmp_path, "m", made, rows)
    for setting in (None, "text", "tokens"):
        assert encoded(load_encoder(folder, setting), "one").problem is None
    asked = encoded(load_encoder(folder, None), "one <image> two").problem
    assert f"a.jsonl:1: holds <image>, token {rows} of a model that has {rows}" in asked
    assert "data.special_tokens=text" in asked
    assert "tokens" in asked
    assert encoded(load_encoder(folder, "text"), "one <image> two").problem is None
    assert "holds <image>" in encoded(load_encoder(folder, "tokens"), "one <image> two").problem
    small = model(tmp_path, "small", made, 300)
    beyond = encoded(load_encoder(small, None), SOURCE[:900]).problem
    assert "of a model that has 300" in beyond


def test_ids_with_gaps_need_the_room_of_the_largest(tmp_path):
    vocabulary = {END: 0, "one": 1, "two": 70_000}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = load_encoder(model(tmp_path, "m", made, 70_001), None)
    assert encoder.largest_id == 70_000
    assert encoded(encoder, "one two").ids.tolist() == [1, 70_000, 0]


TEXTS = {
    "source": SOURCE,
    "one word": "x" * 9000,
    "base64": base64.b64encode(random.Random(1).randbytes(9000)).decode(),
    "no spaces": "東京都千代田区" * 1500,
    "spaces": " " * 9000 + "\n" * 900,
    "digits": "1234567890" * 1000,
    "emoji": "👩‍👩‍👧🙂é" * 1200,
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_long_text_is_tokenised_in_parts_as_the_whole_would_be(
    monkeypatch, folders, folder, name
):
    text, learned = TEXTS[name], [(7, 2222), (5000, 5001)]
    encoder = load_encoder(folder, "text")
    whole, lengths = encoded(encoder, text, learned), []
    monkeypatch.setattr(long_texts, "LONG_TEXT", 5000)
    part = long_texts.part

    def measured(tokenizer, text, start, stop):
        lengths.append(stop - start)
        return part(tokenizer, text, start, stop)

    monkeypatch.setattr(long_texts, "part", measured)
    found = encoded(encoder, text, learned)
    assert found.ids.tolist() == whole.ids.tolist()
    assert found.flags.tolist() == whole.flags.tolist()
    if folder.name != "unigram":  # which makes one token of what it does not know
        assert max(lengths) == 5000, "no part grows"
        assert sum(lengths) < 6 * len(text)
    assert encoded(encoder, text).ids.tolist() == whole.ids.tolist()


def test_a_special_token_in_a_long_text_is_text_or_a_token_as_in_a_short_one(monkeypatch, folders):
    text = f"{SOURCE} {END} " * 2
    for setting in ("text", "tokens"):
        encoder = load_encoder(folders["prepended"], setting)
        whole = encoded(encoder, text).ids.tolist()
        with monkeypatch.context() as patched:
            patched.setattr(long_texts, "LONG_TEXT", 5000)
            assert encoded(encoder, text).ids.tolist() == whole
        assert whole.count(encoder.end_id) == {"text": 1, "tokens": 3}[setting]


def test_a_tokenizer_of_sentencepiece_alone_works_or_the_package_is_named(tmp_path):
    from transformers.utils import is_sentencepiece_available

    folder = layout.model_folder(tmp_path, "m")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**tiny.CONFIG, "vocab_size": 18}))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": BEGIN, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    if is_sentencepiece_available():
        assert encoded(load_encoder(folder, None), "one two").ids.tolist() == [14, 17, 2]
    else:
        with pytest.raises(ConfigError, match="needs the package sentencepiece.*setup.sh"):
            load_encoder(folder, None)


def sentencepiece_model() -> bytes:
    """A BPE of sentencepiece's format, written by hand (its protobuf classes exist only once)."""
    pieces = [
        "▁",
        "o",
        "n",
        "e",
        "t",
        "w",
        "h",
        "r",
        "on",
        "▁o",
        "▁on",
        "▁one",
        "tw",
        "▁tw",
        "▁two",
    ]
    kinds = [("<unk>", 2), (BEGIN, 3), (END, 3), *((piece, 1) for piece in pieces)]
    found = b""
    for number, (piece, kind) in enumerate(kinds):
        name = piece.encode()
        score = np.float32(-number).tobytes()
        body = b"\x0a" + bytes([len(name)]) + name + b"\x15" + score + b"\x18" + bytes([kind])
        found += b"\x0a" + bytes([len(body)]) + body
    # trainer_spec (field 2): model_type 3 = BPE (2), unk_id 40 = 0, bos_id 41 = 1, eos_id 42 = 2
    trainer = b"\x18\x02" + b"\xc0\x02\x00" + b"\xc8\x02\x01" + b"\xd0\x02\x02"
    return found + b"\x12" + bytes([len(trainer)]) + trainer


@pytest.mark.parametrize("written", [[], [(9, 14)]])
def test_a_special_token_that_takes_the_white_space_of_an_answer_is_not_learned(folders, written):
    text = f"{TURN}  one two{END}" if not written else f"{TURN}  {END} two{END}"
    encoder = load_encoder(folders["first_space"], None)
    found = encoded(encoder, text, [(len(TURN), len(text))], written, is_rendered=True)
    assert encoder.tokenizer.id_to_token(int(found.ids[0])) == TURN
    assert found.flags.tolist() == [False, *[True] * (len(found.ids) - 1)]


def test_a_tokenizer_that_is_random_or_cannot_be_read_is_one_line(tmp_path):
    folder = model(tmp_path, "random", byte_level())
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["dropout"] = 0.3
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ConfigError, match=r"at random \(dropout 0.3\).*write there .dropout.: null"
    ):
        load_encoder(folder, None)
    content["model"].update(type="BPE2", dropout=None)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="transformers cannot load its tokenizer .*; choose"):
        load_encoder(folder, None)
