"""The words of the project: the usual ones, in code, documents and messages."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IF = "if, or when"
ATTEMPT = "attempt (of a job's processes)"
INSTEAD = {  # what is not written -> what is
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\banew\b": "again",
    r"\bleft no word\b": "did not report",
    r"\bgo(es)? on (with|from)\b": "continue, or resume",
    r"\bgone on with\b": "continue, or resume",
    r"\bin the making\b": "unfinished",
    r"\bwishes\b": "requests",
    r"\bhow-manieth\b": "how many came before it",
    r"\bstands? twice\b": "is repeated",
    r"\bhope does\b": "say what holds, and what does not",
    r"\b(life|lives)\b": f"{ATTEMPT}; of a process: it runs, or is alive",
    r"Error where\b": IF,
    r"\bNone where\b": IF,
    r"\bFalse where\b": IF,
    r"\bTrue where\b": IF,
    r"\bempty where\b": IF,
    r"\b0 where\b": IF,
}
ALLOWED = (  # lines in which a word is meant as people mean it
    re.compile(r"how a process ends,? (or|and whether (one|it)) lives"),
)


def lines_of_the_project() -> list[tuple[str, str]]:
    """Where each line of each text file is, and the line; this file is left out."""
    command = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("git alone knows which files are the project's, and this is no repository")
    lines = []
    for name in done.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.suffix != ".png" and path != Path(__file__).resolve():
            numbered = enumerate(path.read_text().splitlines(), start=1)
            lines += [(f"{name}:{number}", line) for number, line in numbered]
    return lines


@pytest.mark.parametrize("pattern", INSTEAD, ids=lambda pattern: re.sub(r"\W+b?", " ", pattern))
def test_a_word_that_readers_stumble_over_is_not_written(pattern):
    word = re.compile(pattern, re.IGNORECASE)
    found = [
        f"{location}: {line.strip()}"
        for location, line in lines_of_the_project()
        if word.search(line) and not any(allowed.search(line) for allowed in ALLOWED)
    ]
    assert not found, "\n".join([f"write: {INSTEAD[pattern]}", *found])
