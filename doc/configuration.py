"""Write the page of all settings, from config.yaml, its schema and the scripts' edit blocks.

source env.sh; PYTHONPATH=. "$TRAINSTACK_PYTHON" doc/configuration.py doc/configuration.md
"""

import re
import sys
from pathlib import Path
from typing import Any

from trainstack.config.load import load
from trainstack.config.schema import Config

ROOT = Path(__file__).resolve().parent.parent
PAGE = """# Every setting

`doc/configuration.py` writes this page from config.yaml; do not edit it.

```
source env.sh; PYTHONPATH=. "$TRAINSTACK_PYTHON" doc/configuration.py doc/configuration.md
```

How a run gets its settings, the later over the earlier: config.yaml, then a file of your own with
only what differs (`bash submit.sh my.yaml`), then `key=value` on the command line. All is checked
before anything is queued, and all problems are told at once; `bash submit.sh --dry-run` does only
that. A name of another trainer, such as `lr` or `push_to_hub`, is answered with ours, or with what
there is in its place.

A run that is resumed has settings of its own ([resume.md](resume.md)). *Resume* says what may
change then: `yes`, and the change is told; `no`, that is another run, and refused; `same tokens`,
as long as the same tokens come of it. *Shipped* is the value of config.yaml.

A whole number may be written `1_000`, another one `2e-5`. Text in quotes stays text.
{sections}
## Variables of the environment

Set them for one command, or edit them at the head of the script; those that are unset only there,
since a job gets few names of your shell ([cluster.md](cluster.md)).

| variable | what it is | script | as shipped |
|---|---|---|---|
{variables}

Beside them:

- `HF_TOKEN`, `HF_ENDPOINT`: the download's token, and a mirror of the Hub. A job never gets them.
- `PIP_INDEX_URL`, `PIP_EXTRA_INDEX_URL`: where setup.sh finds packages.
- `TRAINSTACK_FAULT`: breaks a run on purpose ([reliability.md](reliability.md)).
- `ANSWER_SECONDS`: how long the scripts wait for an answer of Slurm; 10 without it.
- `NO_COLOR`: no colours, also on a terminal.
"""
NOTES = {  # section -> what needs more than one setting
    "data": """\
What an entry of `data.mixture` leaves out is as in `data`, but for its revision and its subset.
`data.weight` is set for all data sets of a mixture, or for none. A split that is trained on cannot
be held out. `data.too_long: drop` is refused with `data.packing: concat`, which drops nothing. More
in [data.md](data.md) and [formats.md](formats.md).""",
    "train": """\
`train.global_batch_size` has to be a multiple of `train.micro_batch_size` times the processes. With
so many processes that each has less than `train.micro_batch_size`, a multiple of the processes.""",
    "optim": """\
What `optim.lr_scheduler_kwargs` may hold depends on the schedule: see the table in
[overview.md](overview.md).""",
}
TYPES = {"integer": "whole number", "number": "number", "string": "text", "null": "null",
         "object": "keys and values", "boolean": "`true` or `false`"}  # fmt: skip
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "more than", "exclusiveMaximum": "less than"}
LINE = re.compile(r"  (\w+): (.+?) +# (.+)")  # of config.yaml
EDITED = re.compile(r'(?:# export )?([A-Z_]+)=(?:"\$\{\1:-(.*)\}"|(\S+)) +# (.+?);?')


def page() -> str:
    sections = "".join(f"\n## {name}\n\n{table(name)}\n" for name in Config.model_fields)
    return PAGE.format(sections=sections, variables="\n".join(variables()))


def table(section: str) -> str:
    """The settings of one section, a row for each, and what holds of several."""
    schema = Config.model_json_schema()
    kind = schema["properties"][section]["$ref"].rpartition("/")[2]
    keys = schema["$defs"][kind]["properties"]
    text = (ROOT / "config.yaml").read_text().split(f"\n{section}:\n")[1].split("\n\n")[0]
    rows = ["| setting | what it is | shipped | takes | resume |", "|---|---|---|---|---|"]
    for line in text.splitlines():
        key, value, comment = LINE.fullmatch(line).groups()
        dotted, comment = f"{section}.{key}", re.sub(r'"?<[^>]+>"?', r"`\g<0>`", comment)
        rows.append(row(f"`{dotted}`", comment, f"`{value}`", takes(keys[key]), resume(dotted)))
    return "\n".join([*rows, *(["", NOTES[section]] if section in NOTES else [])])


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def takes(schema: dict[str, Any]) -> str:
    """The values that pydantic's JSON schema of a setting allows, in words."""
    if "anyOf" in schema:
        return " or ".join(takes(each) for each in schema["anyOf"])
    if options := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{option}`" for option in options)
    if schema.get("type") == "array":
        items = schema["items"]
        most = f", at most {schema['maxItems']}" if "maxItems" in schema else ""
        return f"list of {'data sets' if '$ref' in items else takes(items)}{most}"
    if "pattern" in schema:
        return "letters, digits, `.`, `_`, `-`, at most 100"
    bounds = [f"{word} {schema[key]}" for key, word in BOUNDS.items() if key in schema]
    bounds = [bound.replace(str(2**63), "2^63") for bound in bounds]  # of run.seed
    return " ".join([TYPES[schema["type"]], " and ".join(bounds)]).strip()


def resume(dotted: str) -> str:
    mixed = ["data.weight=1", "data.mixture=[{name: another/one, weight: 1}]"]
    adapted = ["adapter.type=lora", "model.init=pretrained"]
    identity = load(ROOT / "config.yaml", [*mixed, *adapted]).identity()
    if dotted in ("run.name", "run.branch_from") or dotted in identity:
        return "no"
    return "same tokens" if dotted.startswith("data.") else "yes"


def variables() -> list[str]:
    """A row for each variable of the edit blocks of the scripts, which say how it is shipped."""
    rows = []
    for name in ("setup.sh", "download_data_model.sh", "train.slurm"):
        block = (ROOT / name).read_text().split("\n# --- Edit")[1].split("\n# ---")[0]
        for line in block.splitlines():
            if found := EDITED.fullmatch(line):
                variable, default, example, comment = found.groups()
                value = f"unset; such as `{example}`" if example else default and f"`{default}`"
                rows.append(row(f"`{variable}`", comment, name, value))
    return rows


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python3 doc/configuration.py PAGE")
    Path(sys.argv[1]).write_text(page())
