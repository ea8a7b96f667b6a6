"""A run in Weights & Biases: on its server, or offline in the run's folder."""

import tempfile
from pathlib import Path
from typing import Any

from trainstack.errors import Failed
from trainstack.storage import files

MOST_TAG = 64  # characters
INIT_SECONDS = 30  # until a server has answered


class Wandb:
    """``after``: the step up to which the place has all.

    Offline it is written from the beginning: what an attempt that was killed left is not whole.
    """

    def __init__(
        self, project: str, run: Path, run_id: str, about: dict[str, Any], is_offline: bool
    ):
        import wandb

        self.wandb, self.is_offline = wandb, is_offline
        if is_offline:
            files.remove_tree(run / "wandb")
        self.folder = tempfile.TemporaryDirectory()
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True,
            x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
            init_timeout=INIT_SECONDS,
        )  # fmt: skip
        names = [about["model"]["name"], *(data_of(about["data"]))]
        self.run = wandb.init(
            project=project, id=run_id, name=run.name, config=about, settings=settings,
            tags=[name[-MOST_TAG:] for name in names if name],
            dir=str(run) if is_offline else self.folder.name,
            mode="offline" if is_offline else "online", resume=None if is_offline else "allow",
        )  # fmt: skip
        self.after = max(0, self.run.starting_step - 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def flush(self, state: dict[str, Any]) -> None:
        self.run.summary.update(state)

    def close(self, state: dict[str, Any], _: str | None) -> str:
        """Wait until all has arrived; where it is. Failed if not all was written."""
        self.run.summary.update(state)
        path = Path(self.run.settings.sync_file)
        self.run.finish(exit_code=int(state.get("state") in ("FAILED", "DIVERGED", "HANG")))
        self.wandb.teardown()  # its other process has closed the file then
        if self.is_offline and not is_whole(path):
            raise Failed(f"{path} was cut short; is the disk full?")
        return str(path.parent) if self.is_offline else self.run.url


def data_of(section: dict[str, Any]) -> list[str]:
    """The names of the data sets."""
    return [part["name"] for part in section.get("mixture") or [section]]


def is_whole(path: Path) -> bool:
    """Whether a .wandb file ends as its last record does, with the message in field 18: exit.

    wandb tells of no failed write, but makes no other after one. (One file in 3,000 has the border
    of a block there, and is taken for a cut one.)
    """
    message = path.read_bytes()[-14:].partition(b"\x92\x01")[2]  # its length, then itself
    return message != b"" and message[0] == len(message) - 1
