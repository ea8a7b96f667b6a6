"""The checkpoint that is exported, and what the project knows of its making."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from trainstack.checkpoint.state import STATE, TrainState, read_state
from trainstack.errors import ConfigError, Failed
from trainstack.run.folder import RunFolder, find_checkpoint
from trainstack.storage import layout, manifest

SHARD_BYTES = 5_000_000_000  # at most, as save_pretrained writes


class Way(NamedTuple):
    """How a checkpoint is exported."""

    dtype: str  # bf16, fp16 or fp32
    is_merged: bool
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class Origin:
    """A model or a data set that a run used, as others may know it."""

    name: str  # of a path its last part: where it was is nobody's business
    is_public: bool  # whether the name is that of a repository on the Hub
    commit: str | None  # that was used; None: not known
    part: str = ""  # of a data set: its subset and split

    def link(self, kind: str = "") -> str:
        """For a page, with what is known of its commit; ``kind``: datasets/, or nothing."""
        text = f"[{self.name}](https://huggingface.co/{kind}{self.name})"
        text = text if self.is_public else self.name
        return text + (f", commit {self.commit[:12]}" if self.commit else "")


@dataclass(frozen=True)
class Source:
    """A checkpoint that verifies, and its run, if it lies in one."""

    checkpoint: Path
    state: TrainState
    run: RunFolder | None
    home: Path | None  # of the project that has the model and the data

    @property
    def name(self) -> str:
        return self.state.settings["run"]["name"]

    @property
    def is_adapter(self) -> bool:
        return (self.checkpoint / layout.ADAPTER_CONFIG).exists()

    @cached_property
    def entries(self) -> dict[str, dict[str, Any]]:
        """The files of the checkpoint that are of the model, as its manifest has them."""
        known = manifest.read_manifest(self.checkpoint)["files"]
        return {name: entry for name, entry in known.items() if not name.startswith("training/")}

    @property
    def model_folder(self) -> Path | None:
        """Where the model is that the run began from."""
        name = self.state.settings["model"]["name"]
        return layout.model_folder(self.home, name) if self.home else None

    def model(self) -> Origin | None:
        """The model whose weights the run began from; None: from scratch."""
        section = self.state.settings["model"]
        if section["init"] == "scratch":
            return None
        return origin_of(section["name"], known_of(self.model_folder))

    def data_sets(self) -> Iterator[tuple[Origin, float | None]]:
        """Each data set, and its weight in the mixture."""
        first = self.state.settings["data"]
        keys = self.state.identity["tokens"].split("+")
        sections = [{**first, **other} for other in ({}, *first.get("mixture", ()))]
        for section, key in zip(sections, keys, strict=True):
            known, made_from = {}, {}
            if self.home:
                folder = layout.dataset_folder(self.home, section["name"], section["subset"])
                known, meta = known_of(folder), self.home / "tokens" / key / "meta.json"
                with contextlib.suppress(OSError, ValueError):
                    made_from = json.loads(meta.read_bytes()).get("made_from", {})
            hashes = {name: entry["sha256"] for name, entry in known.get("files", {}).items()}
            if made_from.get("source", hashes) != hashes:  # fetched again since
                known = {}
            part = ", ".join(p for p in (section["subset"], section["split"]) if p)
            yield origin_of(section["name"], known, part), section.get("weight")


def origin_of(name: str, known: dict[str, Any], part: str = "") -> Origin:
    """A name of a configuration, and the manifest of what it stood for."""
    if layout.is_local(name):
        return Origin(Path(name).name, False, None, part)
    is_public = known.get("source", "hub") == "hub" and name != layout.DEMO
    return Origin(name, is_public, known.get("commit") if is_public else None, part)


def known_of(folder: Path | None) -> dict[str, Any]:
    """The manifest of a model or a data set; empty if it is not there."""
    with contextlib.suppress(OSError, ValueError):
        return manifest.read_manifest(folder) if folder else {}
    return {}


def find_source(text: str, home: Path | None) -> Source:
    """What RUN, RUN@STEP, RUN@best or the folder of a checkpoint names.

    ConfigError if there is no such thing, Failed if it is damaged.
    """
    run, checkpoint = None, Path(text).expanduser().resolve()
    if checkpoint.parent.name == "checkpoints" or not (checkpoint / STATE).is_file():
        try:
            run, checkpoint = find_checkpoint(text, home)
        except ConfigError:
            if not any((checkpoint / n).is_file() for n in ("config.json", layout.ADAPTER_CONFIG)):
                raise
            raise ConfigError(
                f"{checkpoint} has no {STATE}, so it is no checkpoint of a run; it needs no export "
                "(peft merges an adapter into its model: merge_and_unload)"
            ) from None
    if problem := next(manifest.damage(checkpoint), None):
        raise Failed(f"{checkpoint} is damaged ({problem}); name another one, as RUN@STEP")
    own = run.path.parent.parent if run else None
    is_own = own and (home is None or (own / "models").is_dir())
    return Source(checkpoint, read_state(checkpoint), run, own if is_own else home)
