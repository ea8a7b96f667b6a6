"""Names of models, data sets, splits, checkpoints; what is none is refused with what to write.

A name on the Hub that is a file or a folder here too is told apart later, by hub/fetch.py.
"""

import re
from pathlib import Path
from typing import Any

from pydantic_core import PydanticCustomError

from trainstack.storage.layout import absolute, is_local

NOTHING = ("none", "nil", "n/a", "undefined")  # what people write who mean null
ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_URL = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?:datasets/|models/)?"
    r"([\w.-]+(?:/(?!(?:tree|blob|raw|resolve|viewer)/)[\w.-]+)?)(?:[/@?#].*)?"
)
CHECKPOINT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}@[1-9]\d*")
PATTERN = re.compile(r"[*?\[,]")  # several files, as a shell or a list has them
SLICE, SUM = re.compile(r"([\w.-]+)\[.*\].*"), re.compile(r"[\w.-]+(?:\+[\w.-]+)+")
VARIABLE = re.compile(r"\$\w+|\$\{[^}]*\}|%\w+%")
SEVERAL = (
    "for several files name their folder, or one here and the others in data.mixture, each as"
    " {name: ./b.jsonl, weight: null}"
)
SEVERAL_SPLITS = (
    "write one; data.mixture takes others to train on, each as {name: org/name, split: other,"
    " weight: null}"
)


def asset_name(name: str) -> str:
    """The name of a model or a data set: on the Hub, or a path, which becomes absolute."""
    check_variables(name)
    if is_local(name) or ON_HUB.fullmatch(name):
        return absolute(name)
    if url := HUB_URL.fullmatch(name):
        raise _refusal(f"a URL of the Hub; write {url[1]}")
    if "://" in name:
        raise _refusal(
            "a URL; bring what it names to this machine, and write its path there, such as"
            " ./data.jsonl (if it is a mirror of the Hub: org/name, and HF_ENDPOINT)"
        )
    if PATTERN.search(name):
        raise _refusal(f"neither org/name on the Hub nor a path; {SEVERAL}")
    raise _refusal(
        "neither org/name on the Hub nor a path; a path starts with ./ or /, and a revision, a"
        " subset and a split are settings of their own"
    )


def file_path(path: str) -> str:
    """The path of a file, which becomes absolute."""
    check_variables(path)
    return str(Path(path).expanduser().resolve())


def check_variables(path: str) -> None:
    """Refuse what a shell would replace; a path that is there may have such a name."""
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise _refusal("the ~ is of nobody here; write the path itself") from None
    if (found := VARIABLE.search(path)) and not Path(path).expanduser().exists():
        raise _refusal(
            f"{found[0]} is not replaced here; write what it stands for, or set it on the command"
            " line, in double quotes, where the shell does"
        )


def split_name(name: str) -> str:
    """The name of one whole split."""
    if part := SLICE.fullmatch(name):
        raise _refusal(
            f"a part of a split; write a whole one ({part[1]}). data.eval_fraction holds a share of"
            " it out, train.max_steps ends sooner; for other records write a file of them"
        )
    if SUM.fullmatch(name):
        raise _refusal(f"several splits; {SEVERAL_SPLITS}")
    return name


def said(text: str) -> str:
    """A text that says something; a word for nothing is a mistake: YAML has null for it."""
    if text.strip().lower() in NOTHING:
        raise PydanticCustomError("nothing", "a word for nothing")
    return text


def prompt(value: Any) -> Any:
    """A text, or messages that each have a role and a content."""
    if isinstance(value, str):
        return said(value)
    is_list = isinstance(value, list) and value and all(isinstance(m, dict) for m in value)
    if not is_list or any(
        m.keys() != {"role", "content"} or not all(isinstance(text, str) for text in m.values())
        for m in value
    ):
        raise _refusal("no prompt; write a text, or messages as [{role: user, content: Hello}]")
    return value


def checkpoint_name(name: str) -> str:
    """RUN@STEP."""
    if not CHECKPOINT.fullmatch(name):
        raise _refusal("not a checkpoint of a run; write RUN@STEP, such as demo@500")
    return name


def _refusal(text: str) -> PydanticCustomError:
    return PydanticCustomError("name", "{fix}", {"fix": text})
