"""Which files of a data set are data, and which subset and split each belongs to.

Every refusal is a ConfigError that names the fix.
"""

import json
import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from trainstack.errors import ConfigError
from trainstack.hub.asset import Asset
from trainstack.hub.choose import Origin
from trainstack.records import readers
from trainstack.storage import layout
from trainstack.units import counted

CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")  # they define subsets and splits
CONVERTED = "refs/convert/parquet"  # the branch with the Hub's own conversion of a data set
PARTIAL = "partial-"  # of a folder in it, if the data set is large
SAVED = "state.json"  # of a folder that save_to_disk wrote: names its files
SPLIT_WORDS = "train|training|validation|valid|val|dev|test|testing|eval|evaluation"
A_SPLIT = re.compile(rf"(?i)(?<![a-z])(?:{SPLIT_WORDS})(?![a-z])")
A_CACHE = re.compile(r"(^|/)cache-[0-9a-f]+\.arrow$")  # of datasets' map and filter
ABOUT_IT = re.compile(r"(?i)(^|/)(readme|licen[cs]e|notice|citation)")
NO_DATA = re.compile(rf"{ABOUT_IT.pattern}|\.(md|py|ipynb|sh|png|jpe?g|svg|ya?ml)$")
NUMBERED = re.compile(r"(\d+)-of-(\d+)(?=\D|$)")
A_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# A subset, and in the Hub's conversion the split.
SUBSET_FOLDER = re.compile(
    rf"(?!(?:{SPLIT_WORDS})/)([^/]+)/"
    rf"(?:(?:{PARTIAL})?([^/]+)/\d{{4,}}\.parquet|(?:{SPLIT_WORDS})/.+)"
)
A_NAME = re.compile(rb"^([ \t]*-?[ \t]*config_name:[ \t]*)([^\s\"'#]+)[ \t]*$", re.MULTILINE)
# How a README may say that datasets reads its files, which is not done here.
READING = (
    "sep", "header", "names", "index_col", "usecols", "skiprows", "nrows", "skipfooter",
    "quotechar", "quoting", "escapechar", "comment", "encoding", "sample_by", "field", "filters",
)  # fmt: skip


def is_hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name


def is_data_file(name: str) -> bool:
    """Whether a file can matter to a data set."""
    is_kept = readers.is_readable(name) and not (is_hidden(name) or A_CACHE.search(name))
    return name in CARDS or is_kept


def is_unread(name: str, is_local: bool) -> bool:
    """Whether a file of a data set may be data, and cannot be read here.

    Of a repository what describes it, scripts and pictures are none; in a folder here, notes.md is.
    """
    is_known = (ABOUT_IT if is_local else NO_DATA).search(name)
    return not (is_hidden(name) or readers.is_readable(name) or is_known)


def count_types(names: list[str]) -> str:
    """``3 .md, 1 .png``, the most first."""
    counts = Counter(Path(name).suffix or "without an ending" for name in names)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(5))


def not_taken(origin: Origin, wanted: Collection[str], asset: Asset) -> tuple[list[str], list[str]]:
    """Files of the wanted types that belong to no split, and lines on those of other types."""
    rest = [name for name in origin.sizes if is_data_file(name) and name not in wanted]
    rest = [] if asset.subset else rest  # of other subsets
    types, lines = {readers.suffix_of(name) for name in wanted if name not in CARDS}, []
    if others := [name for name in rest if readers.suffix_of(name) not in types]:
        beside = ", ".join(sorted(types))
        lines.append(f"{count_types(others)}, beside {beside}; name them as another data set")
    is_local = layout.is_local(asset.name)
    if unread := [name for name in origin.listing if is_unread(name, is_local)]:
        counts = f"{count_types(unread)}; such as {unread[0]}"
        what = f"{counted(len(unread), 'file')} that cannot be read ({counts})"
        lines.append(f"{what}; if meant, convert to {readers.READABLE}")
    return [name for name in rest if name not in others], lines


def choose_data(origin: Origin, name: str, subset: str | None) -> tuple[list[str], dict[str, Any]]:
    """The files of one subset, with all its splits, and the facts of them for the manifest.

    ConfigError if it is a script, or if no file of it can be read here.
    """
    script = f"{name.rpartition('/')[2]}.py"
    has_data = any(is_data_file(name) and name not in CARDS for name in origin.sizes)
    if script in origin.sizes or (not has_data and any(n.endswith(".py") for n in origin.sizes)):
        raise ConfigError(
            f"is made by the script {script}, which is never run here; set data.revision="
            f"{CONVERTED}, where the Hub keeps what such a script made, or name another data set"
        )
    if not has_data:
        some = ", ".join(n for n in origin.listing if "." in n.lstrip("."))[:60] or "nothing"
        fix = "convert to one, unpack archives such as .zip"
        raise ConfigError(f"has no {readers.READABLE} file (it has {some}); {fix}")
    if not subset and layout.is_local(name) and Path(name).is_file():
        return [*origin.sizes], {"subset": None, "splits": {"train": [*origin.sizes]}}
    cards = [name for name in origin.sizes if is_card(name, origin.sizes)]
    origin.collect(cards)
    texts = {card: (origin.folder / card).read_bytes() for card in cards}
    splits = resolve_splits(origin.sizes, texts, subset)
    paths = sorted({path for split in splits.values() for path in split} - {*cards})
    if odd := [path for path in paths if not readers.is_readable(path)]:
        raise ConfigError(f"consists of files such as {odd[0]}; convert to {readers.READABLE}")
    if missing := [path for path in paths if path not in origin.sizes]:
        raise ConfigError(f"has no {missing[0]}, which its {SAVED} names; bring the whole folder")
    once = {split: list(dict.fromkeys(names)) for split, names in splits.items()}  # of patterns
    return [*cards, *paths], {"subset": subset, "splits": once}


def oddities(splits: dict[str, list[str]], entries: dict[str, dict[str, Any]]) -> list[str]:
    """Lines on files that are there twice, to be learned again or held out too, or are missing.

    ``splits``: the files of each that is used; ``entries``: their entries in the manifest.
    """
    first, lines = {}, []
    for split, name in [(split, name) for split, names in splits.items() for name in names]:
        content = entries[name]["sha256"]
        stem = name.lower().removesuffix(readers.suffix_of(name))
        for key, what in ((name, ""), (content, "the same content"), (stem, "the same name")):
            other, its_split = first.setdefault(key, (name, split))
            if other != name:
                lines.append(f"{name} seems to be {other} again ({what}); take one away if it is")
            elif its_split != split:
                lines.append(f"{name} is in the splits {its_split} and {split}; take it out of one")
            else:
                continue
            break
    more = [f"{len(lines) - 3} more files are there twice"] if len(lines) > 3 else []
    every = sorted({name for names in splits.values() for name in names})
    return [*lines[:3], *more, *missing_shards(every)]


def missing_shards(names: Iterable[str]) -> list[str]:
    """Lines on sets of files such as train-00000-of-00003.parquet of which some are not there."""
    sets: dict[tuple[str, int], list[int]] = {}
    for name in names:
        for found in NUMBERED.finditer(name):
            sets.setdefault((name[: found.start()], int(found[2])), []).append(int(found[1]))
    lines = []
    for (stem, total), numbers in sets.items():
        expected = range(total) if total not in numbers else range(1, total + 1)
        if gone := sorted({*expected} - {*numbers}):
            lines.append(f"of the {total:,} files {stem}*-of-* {len(gone):,} are not there, first "
                         f"number {gone[0]:,}; bring them if they are meant")  # fmt: skip
        if others := [t for s, t in sets if s == stem and t < total]:
            lines.append(f"there are {stem}* of {others[0]:,} files and of {total:,}; take those "
                         "away that are older")  # fmt: skip
    return lines


def is_card(name: str, names: Iterable[str]) -> bool:
    """Whether a file says something about the data: a README, or what save_to_disk adds to it."""
    is_saved = name.rpartition("/")[2] in (SAVED, "dataset_info.json", "dataset_dict.json")
    return name in CARDS or (is_saved and any(other.endswith(".arrow") for other in names))


def resolve_splits(
    names: Iterable[str], cards: dict[str, bytes], subset: str | None
) -> dict[str, list[str]]:
    """The files of each split of a subset. ConfigError if there is no such subset, or several.

    ``names``: all files; ``cards``: the content of those that say something about them. Subsets are
    those that a README defines, else folders: those whose own folders are splits, as in the Hub's
    conversions (SUBSET/SPLIT/0000.parquet), or the one that is asked for.
    """
    if is_defined(cards):
        return ask_datasets(names, cards, subset)
    files = [name for name in names if is_data_file(name) and name not in cards]
    in_folders = [SUBSET_FOLDER.fullmatch(name) for name in files]
    subsets = sorted({found[1] for found in in_folders}) if all(in_folders) else []
    if subset not in subsets and len(subsets) > (not subset):
        raise ConfigError(
            f"has the subsets {', '.join(subsets)}; set data.subset to one of them (to train on"
            " several, name each in data.mixture)"
        )
    below = f"{subset or subsets[0]}/" if subset or subsets else ""
    inside = [name for name in names if name.startswith(below) and name not in cards]
    if saved := saved_splits(cards, below):
        return saved
    if inside and all(found and found[2] for found in in_folders):
        splits: dict[str, list[str]] = {}
        for name in sorted(inside):
            splits.setdefault(SUBSET_FOLDER.fullmatch(name)[2], []).append(name)
        return splits
    if not (below and inside):
        return ask_datasets(names, cards, subset)
    found = ask_datasets([name.removeprefix(below) for name in inside], {}, None)
    return {split: [below + path for path in paths] for split, paths in found.items()}


def saved_splits(cards: dict[str, bytes], below: str) -> dict[str, list[str]]:
    """The splits that ``save_to_disk`` of the library datasets wrote; nothing if it did not."""
    splits = {}
    for card, content in sorted(cards.items()):
        folder, _, name = card.rpartition("/")
        if name == SAVED and card.startswith(below):
            split = f"{folder}/".removeprefix(below).strip("/") or "train"
            try:
                shards = [shard["filename"] for shard in json.loads(content)["_data_files"]]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{card} names no files; write it with save_to_disk") from None
            splits[split] = [f"{folder}/{shard}".lstrip("/") for shard in shards]
    return splits


def ask_datasets(
    names: Iterable[str], cards: dict[str, bytes], subset: str | None
) -> dict[str, list[str]]:
    """The files of each split of a subset, as the library ``datasets`` finds them.

    It is given empty files of these names, so that it sends no request and treats a local folder
    alike; without capitals, which it does not know. It is asked while all names are known: asked
    for one subset, it wants the files of the first too.
    """
    import datasets

    datasets.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    stand_ins = {name if is_defined(cards) else small(name): name for name in names}
    if len(stand_ins) < len([*names]):  # some differ by their capitals alone
        stand_ins = {name: name for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch).resolve() / "data"
        for name in stand_ins:
            if name.endswith(".py"):  # data.py would be taken for a script
                continue
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            # Names of subsets are texts, though YAML reads no, 1.0 or 2024 as something else.
            (root / name).write_bytes(A_NAME.sub(rb'\1"\2"', cards.get(name, b"")))
        try:
            builder = datasets.load_dataset_builder(str(root), subset, cache_dir=scratch)
        except Exception as error:  # of YAML, of zip, ValueError, FileNotFoundError, its own
            words = re.split("Example of|with any supported", str(error))[0].replace(f"{root}/", "")
            words = " ".join(words.replace(str(root), "it").split())[:300].strip()
            if empty := re.search(r"'([^']+)': \(None, ", words):
                words = f"no file is at the paths of split {empty[1]}"
            fixes = ["set data.subset to one that it has"] if subset or is_defined(cards) else []
            if "README.md" in cards:
                fixes.append("correct its README.md (for one of the Hub: in a copy here)")
            loud = (n for n in names if n in words and not n.endswith(readers.suffix_of(n)))
            if odd := next(loud, None):
                fixes = [f"give {odd} a suffix in small letters, here and in its README.md"]
            fix = ", or ".join(fixes) or "give its splits files of one type, or name the one file"
            raise ConfigError(f"datasets cannot resolve its files ({words}); {fix}") from None
        refuse_settings(builder.config)
        found = {str(split): paths for split, paths in (builder.config.data_files or {}).items()}
        return {s: [stand_ins[os.path.relpath(p, root)] for p in found[s]] for s in found}


def is_defined(cards: dict[str, bytes]) -> bool:
    """Whether a README says what the subsets and splits are."""
    return any(re.search(rb"^configs:", text, re.MULTILINE) for text in cards.values())


def small(name: str) -> str:
    """A file's name with its suffix and the words for splits in small letters."""
    suffix = readers.suffix_of(name)
    stem = name[: len(name) - len(suffix)]
    if not A_SHARD.search(stem):  # it begins with the split's own name
        stem = A_SPLIT.sub(lambda found: found[0].lower(), stem)
    return stem + suffix


def refuse_settings(config: Any) -> None:
    """ConfigError if a README has settings of a reader, by which the records would be others."""
    usual = type(config)()
    given = {key: getattr(config, key) for key in READING if hasattr(usual, key)}
    odd = [f"{k}={v!r}" for k, v in given.items() if v not in (getattr(usual, k), "utf-8")]
    if odd:
        raise ConfigError(
            f"its README wants its files read with {', '.join(odd)}, which is not done here; write "
            "them as usual (.csv: commas, names in the first row; .json: records; .txt: see "
            "data.split_on), and take that out"
        )
