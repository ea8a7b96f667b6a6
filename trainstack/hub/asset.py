"""The models and data sets that a configuration names, and where each belongs."""

from dataclasses import dataclass
from pathlib import Path

from trainstack.config.schema import Config
from trainstack.storage import layout


@dataclass(frozen=True)
class Asset:
    """A model or a data set that a configuration names."""

    kind: str  # model or dataset, the Hub's words
    name: str
    revision: str
    home: Path  # the project's folder
    needs_weights: bool = False
    subset: str | None = None
    splits: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{'model' if self.kind == 'model' else 'data set'} {self.name}"

    @property
    def folder(self) -> Path:
        """Where it is once it is whole."""
        if self.kind == "model":
            return layout.model_folder(self.home, self.name)
        return layout.dataset_folder(self.home, self.name, self.subset)

    @property
    def lock(self) -> Path:
        """Of the one process at a time that brings it there."""
        name = str(self.folder.relative_to(self.home)).replace("/", "--")
        return self.home / "cache" / "locks" / name


def named_assets(config: Config, home: Path) -> list[Asset]:
    """What the configuration names: of a subset once, with all splits that the mixture takes."""
    model, splits = config.model, dict[tuple[str, str, str | None], list[str]]()
    assets = [Asset("model", model.name, model.revision, home, model.init == "pretrained")]
    for data in config.data.sources:
        wanted = splits.setdefault((data.name, data.revision, data.subset), [])
        wanted += [s for s in (data.split, data.eval_split) if s and s not in wanted]
    for (name, revision, subset), wanted in splits.items():
        assets.append(Asset("dataset", name, revision, home, subset=subset, splits=tuple(wanted)))
    return assets


def needed_assets(config: Config, home: Path, has_checkpoint: bool) -> list[Asset]:
    """What a run cannot do without, beside its tokens.

    Once there is a checkpoint nothing, but for the model that an adapter belongs to.
    """
    wanted = named_assets(config, home)
    if not has_checkpoint:
        return wanted
    return [a for a in wanted if a.kind == "model" and config.adapter.type]
