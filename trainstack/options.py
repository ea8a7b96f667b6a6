"""What the command lines of the package share: --home, --config, key=value."""

import argparse
import os
from pathlib import Path

from trainstack.errors import ConfigError


def parser_of(command: str, description: str, has_config: bool = False) -> argparse.ArgumentParser:
    """The parser of ``python -m trainstack COMMAND``; ``has_config``: with --config, key=value."""
    prog = f"python -m trainstack {command}"
    parser = argparse.ArgumentParser(prog=prog, description=description)
    if has_config:
        parser.add_argument("--config", type=Path, default=Path("config.yaml"), metavar="FILE")
        parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def parse(
    parser: argparse.ArgumentParser, arguments: list[str], needs_home: bool = True
) -> argparse.Namespace:
    """Add --home, and parse; ConfigError if the project's folder is needed and not known."""
    home, what = os.environ.get("TRAINSTACK_HOME"), "$SHARED_DIR/$PROJECT_NAME; env.sh sets it"
    parser.add_argument("--home", type=Path, default=home, metavar="DIR", help=what)
    options = parser.parse_intermixed_args(arguments)
    if needs_home and options.home is None:
        raise ConfigError("the project's folder is not known; run: source env.sh (or pass --home)")
    return options
