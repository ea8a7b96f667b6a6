"""Sizes, durations and moments, as people read them."""

import json
import time
from datetime import datetime
from typing import Any

NOTHING = "-"  # in place of what is not known


def now() -> str:
    """The time of day in UTC, to the millisecond."""
    return time_of(time.time())


def time_of(seconds: float) -> str:
    """A moment, in seconds since 1970, as it stands in the records."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{stamp}.{int(seconds * 1000) % 1000:03d}Z"


def seconds_of(stamp: str) -> float:
    """The moment of a record, in seconds since 1970."""
    return datetime.fromisoformat(stamp).timestamp()


def duration(seconds: float | None) -> str:
    """``MM:SS`` below an hour, ``HH:MM:SS`` below a day, else days as well; NOTHING of None."""
    if seconds is None:
        return NOTHING
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}:{minutes:02d}:{seconds:02d}"
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


def counted(number: float, noun: str) -> str:
    """``1 file``, ``2,000 files``."""
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"


def bytes_text(size: float) -> str:
    """Bytes as people read them: 269 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def age(seconds: float) -> str:
    """A duration in its largest unit: 3 min."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def rounded(perplexity: float) -> str:
    """With two digits behind the point, or as 1.23e+45."""
    if perplexity > 1e300:  # e to a loss beyond 700 is kept there
        return "beyond 1e300"
    return f"{perplexity:.2f}" if perplexity < 1e6 else f"{perplexity:.2e}"


def as_json(data: Any, indent: int | None = None) -> str:
    """Data as every reader of JSON takes it; a number that is not finite becomes null."""
    plain = json.loads(json.dumps(data), parse_constant=lambda _: None)
    return json.dumps(plain, indent=indent)
