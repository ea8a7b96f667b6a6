"""A model or data set of this machine: linked and hashed, so that a change is noticed."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainstack.errors import ConfigError
from trainstack.hub import choose
from trainstack.hub.asset import Asset
from trainstack.storage import manifest

POINTER = b"version https://git-lfs.github.com/spec/v1"


class LocalFiles:
    """An origin: a local original, to which links are made and whose hashes are kept.

    It is not copied. ``sizes`` (bytes) and ``modified_ns`` (since 1970) cover the files that can
    matter, used or not. ConfigError if it is not there, or not a folder if it is a model.
    """

    doing, done = "linking", "linked"
    is_resumable = False  # links are made again in no time

    def __init__(self, asset: Asset):
        original, is_model = Path(asset.name), asset.kind == "model"
        if not original.exists():
            key = "model" if is_model else "data"
            raise ConfigError(f"no such file or folder; check {key}.name")
        if is_model and not original.is_dir():
            raise ConfigError("is a file; name the folder that holds config.json")
        self.root = original if original.is_dir() else original.parent
        inside = [*(self.root.iterdir() if is_model else self.root.rglob("*"))]
        inside += (self.root / choose.TEMPLATES).glob("*") if is_model else []
        can_matter = choose.is_model_file if is_model else choose.is_data_file
        named: set[str] = set()  # by an index of weights, also in folders
        if is_model and (self.root / choose.INDEX).is_file():
            named = {*choose.shards_of(self.root / choose.INDEX)}
            inside += [self.root / name for name in named if "/" in name]
        self.sizes, self.modified_ns = {}, {}
        for path in sorted(inside) if original.is_dir() else [original]:
            relative = str(path.relative_to(self.root))
            if (relative in named or can_matter(relative)) and path.is_file():
                stat = path.stat()
                self.sizes[relative], self.modified_ns[relative] = stat.st_size, stat.st_mtime_ns
            elif can_matter(relative) and path.is_symlink() and not path.exists():
                raise ConfigError(f"{relative} links to what is not there; fix or remove it")
        self.folder = asset.folder.with_name(f".{asset.folder.name}.local.partial")
        self.entries: dict[str, dict[str, Any]] = {}
        self.facts = {"source": "local", "modified_ns": self.modified_ns}

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
            with (self.root / name).open("rb") as file:
                if file.read(len(POINTER)) == POINTER:
                    fix = f"run in {self.root}: git lfs pull"
                    raise ConfigError(f"{name} is a pointer of git-lfs, not the file; {fix}")
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).symlink_to(self.root / name)
            self.entries[name] = manifest.hash_file(self.root / name)
