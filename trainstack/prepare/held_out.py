"""Which documents are held out: by a hash of their text; where that finds none, by their place."""

from dataclasses import dataclass, replace
from typing import Any

from trainstack.data.split import EVAL, TRAIN
from trainstack.records.chunks import Part, text_hash

Piece = tuple[Any, Part | None, str]  # a record, its place in a long one, its split


def is_held_out(text: str, fraction: float, part: Part | None = None) -> bool:
    """Whether a keyed hash of its text holds a document out: never one of two copies alone.

    ``part``: of the document, if ``text`` is not the whole.
    """
    digest = text_hash()
    digest.update(text.encode("utf-8", "surrogatepass"))
    number = int.from_bytes(part.digest if part else digest.digest(), "little")
    return number < fraction * 2**64


@dataclass(frozen=True)
class Boundary:
    """Where the held-out part begins if no hash decides: in the last document.

    ``file``: the number of its file. ``start``: in characters of its text; it is cut at the end of
    the line before, if that is not more than ``room`` characters before. 0: the whole document is
    held out; None: nothing is.
    """

    file: int
    location: str
    start: int | None
    room: int
    reason: str  # for people

    def divide(
        self, file: int, location: str, record: Any, part: Part | None, column: str
    ) -> list[Piece]:
        """A record, or a part of a long one, as what is trained on and what is held out."""
        if (file, location) != (self.file, self.location) or self.start is None:
            return [(record, part, TRAIN)]
        part = part or Part(0, is_continued=False)
        offset = self.start - part.start
        if offset <= 0:
            return [(record, part, EVAL)]
        text = record[column]
        if offset > len(text):
            return [(record, part, TRAIN)]
        first = max(0, offset - self.room)
        line, space = (text.rfind(sign, first, offset - 1) + 1 for sign in "\n ")
        cut = line or space or offset
        begin = replace(part, is_continued=True, after="")
        rest = Part(part.start + cut, part.is_continued, after=part.after)
        return [({column: text[:cut]}, begin, TRAIN), ({column: text[cut:]}, rest, EVAL)]
