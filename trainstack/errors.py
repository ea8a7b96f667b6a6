"""What a person is told when they asked for something that cannot be: one line, with its fix."""

import re
from typing import Any

USAGE_ERROR = 2
# Each with what stays of it; the limits keep it linear in the text.
SENT = r"(://) [^\s/]+ (?=@) | (\bbearer[ ]) [\w.~+/=-]{8,}"
NAME = r"""(?: token(?![a-z]) | (?-i:TOKENS) | secret | passw | api[_-]?key | access_key
    | credential | authorization) [\w-]{0,30}"""
SECRET = re.compile(
    rf"""()\bhf_\w{{8,}} | {SENT}
    | ({NAME} [\\'"]{{0,2}} (?: [ ]?=[ ]? | [ ]?:[ ]?(?=["']|\S{{4}}) )
        (?: [\\'"]{{0,2}} (?:bearer|basic|token)[ ] )?)
      (?: "[^"\n]*" | '[^'\n]*' | \S+ )""",
    re.IGNORECASE | re.VERBOSE,
)
SECRET_IN_CODE = re.compile(  # where names stand for values: literals alone
    rf"""()\bhf_[a-z0-9]{{20,}} | {SENT}
    | ({NAME} ["']?[ ]?[=:][ ]?) (?: "[\w-]{{16,}}" | '[\w-]{{16,}}'
        | (?=[a-z_-]*\d)[\w-]{{16,}}(?![\w.(\[-]) )""",
    re.IGNORECASE | re.VERBOSE,
)


class ConfigError(Exception):
    """A person asked for something that cannot be; each problem is one line with its fix."""

    code = USAGE_ERROR  # exit code of the command that reports it

    def __init__(self, *problems: str):
        self.problems = list(problems)
        super().__init__("\n".join(problems))

    def __reduce__(self):  # rank 0 sends it to its peers
        return type(self), tuple(self.problems)

    def report(self, speaker: str, consequence: str = "") -> str:
        """One line for one problem; for several a head line and an indented line each."""
        if len(self.problems) == 1:
            return f"{speaker}: error: {self.problems[0]}"
        head = f"{speaker}: error: {len(self.problems)} problems in the configuration{consequence}"
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


class Failed(ConfigError):
    """The request was right, but something else is in the way."""

    code = 1


class Refused(ConfigError):
    """The run folder belongs to another job, or to another experiment."""

    code = 78


class DataError(Exception):
    """A data file holds something that is not a document; says file, line, what and the fix."""


def first_line(error: Exception) -> str:
    """What an error of other people's code says first; its kind, if it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def first_words(error: Exception) -> str:
    """What an error of other people's code is and says, short and on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def shown(value: Any) -> str:
    """A value as a message shows it: on one line, and not longer than one."""
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if not text.isprintable():
        text = repr(text)
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text):,} characters)"


def without_secrets(text: str, secret: re.Pattern = SECRET) -> str:
    """A text of a log or a command line without the tokens that somebody wrote there."""
    return secret.sub(lambda found: f"{found[found.lastindex]}...", text)
