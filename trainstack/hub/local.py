"""A model or data set of this machine: linked and hashed, so that a change is noticed."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trainstack.config.names import PATTERN, SEVERAL
from trainstack.errors import ConfigError
from trainstack.hub import choose, data_files
from trainstack.hub.asset import Asset
from trainstack.hub.weights import INDEX, shards_of
from trainstack.storage import files, manifest

POINTER = b"version https://git-lfs.github.com/spec/v1"


class LocalFiles:
    """An origin: a local original, to which links are made and whose hashes are kept.

    It is not copied. ``sizes`` (bytes) and ``modified_ns`` (since 1970) cover the files that can
    matter, used or not. ConfigError if it is not there, or not a folder if it is a model.
    """

    doing, done = "linking", "linked"
    is_resumable = False  # links are made again in no time

    def __init__(self, asset: Asset):
        self.original = Path(asset.name)
        # A checkpoint of a run here would be pruned one day: its files get a second name.
        self.is_kept = (asset.home / "runs").resolve() in self.original.resolve().parents
        self.folder = asset.folder.with_name(f".{asset.folder.name}.local.partial")
        self.entries: dict[str, dict[str, Any]] = {}
        self.sizes, self.modified_ns = {}, {}
        source = "checkpoint" if self.is_kept else "local"
        self.facts = {"source": source, "modified_ns": self.modified_ns}
        self._is_model = asset.kind == "model"
        with readable():
            self._look()

    def _look(self) -> None:
        original, is_model = self.original, self._is_model
        if not original.exists():
            check = f"check {'model' if is_model else 'data'}.name"
            several = PATTERN.search(str(original))
            raise ConfigError(f"no such file or folder; {SEVERAL if several else check}")
        if is_model and not original.is_dir():
            no_folder = "is a file; name the folder that holds config.json"
            raise ConfigError(choose.GGUF if original.name.endswith(".gguf") else no_folder)
        self.root = original if original.is_dir() else original.parent
        if (original / "refs").is_dir() and (original / "snapshots").is_dir():
            main = original / "refs" / "main"
            commit = main.read_text().strip() if main.is_file() else "COMMIT"
            raise ConfigError(f"is the Hub's cache of it; name one revision, as snapshots/{commit}")
        inside = [*self.root.iterdir()] if is_model else [*files_below(original)]
        inside += (self.root / choose.TEMPLATES).glob("*") if is_model else []
        can_matter = choose.is_model_file if is_model else data_files.is_data_file
        named: set[str] = set()  # by an index of weights, also in folders
        if is_model and (self.root / INDEX).is_file():
            named = {*shards_of(self.root / INDEX)}
            inside += [self.root / name for name in named if "/" in name]
        self._inside = []
        for path in sorted(inside):
            relative = str(path.relative_to(self.root))
            self._inside.append(relative)
            if (relative in named or can_matter(relative)) and path.is_file():
                stat = path.stat()
                self.sizes[relative], self.modified_ns[relative] = stat.st_size, stat.st_mtime_ns
            elif can_matter(relative) and path.is_symlink() and not path.exists():
                raise ConfigError(f"{relative} links to what is not there; fix or remove it")

    @property
    def listing(self) -> list[str]:
        """The files that are there, whether they matter or not; of a model folders too."""
        if not self._is_model:
            return self._inside
        found = (self.root.glob(p) for p in ("*", "*/*", "*/*/config.json"))
        return [str(p.relative_to(self.root)) for p in sorted(itertools.chain(*found))]

    @property
    def commit(self) -> str:
        """A name of the content, as a commit of the Hub is: 40 digits of a hash of the hashes."""
        return hashlib.sha256(json.dumps(self.entries, sort_keys=True).encode()).hexdigest()[:40]

    def missing_bytes(self, names: Iterable[str]) -> int:
        """What these files take on the disk: links take nothing."""
        return 0

    def collect(self, names: Iterable[str]) -> None:
        """Link these files and hash what they link to. ConfigError for a pointer of git-lfs."""
        if not self.entries:
            shutil.rmtree(self.folder, ignore_errors=True)
        for name in set(names) - self.entries.keys():
            with readable(), (self.root / name).open("rb") as file:
                if file.read(len(POINTER)) == POINTER:
                    fix = f"run in {self.root}: git lfs pull"
                    raise ConfigError(f"{name} is a pointer of git-lfs, not the file; {fix}")
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            with readable():
                if self.is_kept:
                    files.give_second_name(self.root / name, self.folder / name)
                else:
                    (self.folder / name).symlink_to(self.root / name)
                self.entries[name] = manifest.hash_file(self.root / name)


def files_below(original: Path) -> Iterator[Path]:
    """A file itself; of a folder all files, also behind links to folders, each folder once."""
    if original.is_file():
        yield original
        return
    seen = set()
    for folder, folders, names in os.walk(original, onerror=refuse, followlinks=True):
        yield from (Path(folder, name) for name in names)
        inner, folders[:] = sorted(folders), []
        for path in (Path(folder, name) for name in inner if not name.startswith(".")):
            real = path.resolve()
            is_around = original.is_relative_to(real) or real.is_relative_to(original)
            if real not in seen and not (path.is_symlink() and is_around):
                seen.add(real)
                folders.append(path.name)


def refuse(error: OSError) -> None:
    raise error


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """ConfigError for what the system does not let us read."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be read ({error.strerror}); ask its owner, or bring it again"
        ) from None
