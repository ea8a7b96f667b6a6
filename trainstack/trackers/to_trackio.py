"""A run in trackio: in a database of this machine, or of a Space of the Hugging Face Hub.

trackio.log has threads that lose what they hold if they are killed. Its storage, which its own
imports use, writes whole transactions, and each line by its id once.
"""

from pathlib import Path
from typing import Any


class Trackio:
    """``after``: 0, for all may be written again."""

    def __init__(
        self, project: str, run: Path, run_id: str, about: dict[str, Any], is_offline: bool
    ):
        from trackio.sqlite_storage import SQLiteStorage

        self.storage, self.project, self.name, self.id = SQLiteStorage, project, run.name, run_id
        self.about, self.after = about, 0
        self.steps: list[int] = []  # not written yet, but the first
        self.values: list[dict[str, float]] = []

    def add(self, step: int, values: dict[str, float]) -> None:
        self.steps.append(step)
        self.values.append(values)

    def flush(self, state: dict[str, Any]) -> None:
        """With the state, which only goes with a line: the last one is kept for that."""
        self.storage.bulk_log(
            self.project, self.name, self.values, self.steps, run_id=self.id,
            log_ids=[f"{self.id}-{step}" for step in self.steps],
            config={**self.about, "state": state},
        )  # fmt: skip
        self.steps, self.values = self.steps[-1:], self.values[-1:]

    def close(self, state: dict[str, Any], space: str | None) -> str:
        """Where it is."""
        self.flush(state)
        if space:
            from trackio import sync

            return sync(self.project, space, force=True)
        return str(self.storage.get_project_db_path(self.project))
