"""``python -m trainstack export``: a checkpoint as a folder that others can use, and on the Hub.

RUN is the name or the folder of a run, and means its newest checkpoint; RUN@STEP and RUN@best are
others, and the folder of a checkpoint does as well. The folder that it leaves was loaded again and
compared with the checkpoint. --push takes the token of HF_TOKEN or of ``hf auth login``.
"""

import argparse
import re
import sys
from pathlib import Path

from trainstack.errors import ConfigError, Failed
from trainstack.export.folder import export
from trainstack.export.source import Source, Way, find_source
from trainstack.hub.fetch import configure_libraries, redacted
from trainstack.options import parse, parser_of
from trainstack.storage import files

TYPES = ("bf16", "fp16", "fp32")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    check_options(options.push, options.private)
    source = find_source(options.run, options.home)
    check_kind(source, options.dtype, options.merge)
    precision = source.state.settings["train"]["precision"]
    is_as_it_is = precision not in TYPES or (source.is_adapter and not options.merge)
    dtype = options.dtype or ("fp32" if is_as_it_is else precision)
    if source.home:
        configure_libraries(source.home)
    if options.push:
        from trainstack.hub import push

        push.check_token()
    state = source.run.status().get("state") if source.run else "DONE"
    unfinished = "" if state == "DONE" else f"; the run is {state}"
    say(f"run {source.name}, {source.checkpoint.name}, whole{unfinished}")
    target = options.to.expanduser().absolute()
    try:
        export(source, target, Way(dtype, options.merge), say)
        base = source.model() if source.is_adapter and not options.merge else None
        if base and not base.is_public:
            say(f"others need {base.name} beside it, a folder of yours; --merge puts it in")
        print(target)
        if options.push:
            print(push.push(target, options.push, options.private, say))
    except OSError as error:
        raise Failed(files.disk_problem(error, "name another --to")) from None
    return 0


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of("export", __doc__)
    parser.add_argument("run", metavar="RUN[@STEP]", help="what is exported")
    parser.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="where to")
    parser.add_argument("--dtype", choices=TYPES, help="of the weights; default: train.precision's")
    parser.add_argument("--merge", action="store_true", help="put the adapter into its model")
    parser.add_argument("--push", metavar="ORG/NAME", help="and bring it to the Hub")
    parser.add_argument("--private", action="store_true", help="a repository for few")
    return parse(parser, arguments, needs_home=False)


def check_options(repository: str | None, is_private: bool) -> None:
    if repository and not REPOSITORY.fullmatch(repository):
        raise ConfigError(f"--push {repository} is no name of a repository; write ORG/NAME")
    if is_private and not repository:
        raise ConfigError("--private is of a repository on the Hub; add --push ORG/NAME")


def check_kind(source: Source, dtype: str | None, is_merged: bool) -> None:
    if is_merged and not source.is_adapter:
        raise ConfigError(
            f"{source.checkpoint.name} is no adapter, so --merge has nothing to merge"
        )
    if dtype and source.is_adapter and not is_merged:
        raise ConfigError(
            f"--dtype {dtype}: {source.checkpoint.name} is an adapter, which stays as it was "
            "trained; leave it out, or add --merge"
        )


def say(text: str) -> None:
    print(redacted(f"export: {text}"), file=sys.stderr, flush=True)
