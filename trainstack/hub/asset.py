"""The models and data sets that a configuration names, and where each belongs."""

from dataclasses import dataclass
from pathlib import Path

from trainstack.config.schema import Config
from trainstack.storage import layout


@dataclass(frozen=True)
class Asset:
    """A model or a data set that a configuration names.

    ``folder`` is where it is once it is whole; ``lock`` lets one process at a time bring it there.
    """

    kind: str  # model or dataset, the Hub's words
    name: str
    revision: str
    folder: Path
    lock: Path
    needs_weights: bool = False
    subset: str | None = None
    splits: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{'model' if self.kind == 'model' else 'data set'} {self.name}"

    @property
    def aside(self) -> Path:
        """Where the old folder is while a new one takes its place."""
        return self.folder.with_name(f".{self.folder.name}.old")


def named_assets(config: Config, home: Path) -> list[Asset]:
    """What the configuration names, but not the demo, which is made here."""
    named = [named_model(config, home), *named_data(config, home)]
    return [asset for asset in named if asset.name != layout.DEMO]


def named_model(config: Config, home: Path) -> Asset:
    model = config.model
    folder = layout.model_folder(home, model.name)
    return Asset(
        kind="model",
        name=model.name,
        revision=model.revision,
        folder=folder,
        lock=lock_path(home, folder),
        needs_weights=model.init == "pretrained",
    )


def named_data(config: Config, home: Path) -> list[Asset]:
    """One asset for each subset of a data set, with all splits that the mixture takes of it."""
    splits: dict[tuple[str, str | None, str], list[str]] = {}
    for data in config.data.sources:
        wanted = splits.setdefault((data.name, data.subset, data.revision), [])
        wanted += [s for s in (data.split, data.eval_split) if s and s not in wanted]
    assets = []
    for (name, subset, revision), wanted in splits.items():
        folder = layout.dataset_folder(home, name, subset)
        assets.append(
            Asset(
                kind="dataset",
                name=name,
                revision=revision,
                folder=folder,
                lock=lock_path(home, folder),
                subset=subset,
                splits=tuple(wanted),
            )
        )
    return assets


def lock_path(home: Path, folder: Path) -> Path:
    return home / "cache" / "locks" / str(folder.relative_to(home)).replace("/", "--")
