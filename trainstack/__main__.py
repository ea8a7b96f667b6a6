"""The commands of the package by their names: ``python -m trainstack [NAME ...]``.

Imports only the command that is called: a login node prints the list at once.
"""

import difflib
import importlib
import os
import sys

from trainstack.errors import USAGE_ERROR, ConfigError
from trainstack.processes import run_command

COMMANDS = {  # name -> module that has main(arguments) -> exit code, or ConfigError; what it does
    "config": (".config.command", "check and print a configuration and its batch"),
    "hub": (".hub.fetch", "fetch the model and the data sets of a configuration"),
    "prove": (".model.proof", "try whether the model can be trained as configured"),
    "prepare": (".prepare.prepare", "turn the data sets of a configuration into tokens"),
    "data_report": (".data.report", "show what would be learned: counts, lengths, rows"),
    "plan": (".plan.command", "estimate memory, step time and hours of a run"),
    "eval": (".evaluation.command", "measure a checkpoint, or any model, on held-out data"),
    "ledger": (".history.ledger", "recompute whether a run used each sample once"),
    "goodput": (".history.goodput", "show where the time of a run went"),
    "report": (".report.page", "write a page about a run, or one that compares several"),
    "export": (".export.command", "leave a model as a folder for others, or on the Hub"),
    "track": (".trackers.command", "show a run in Weights & Biases or trackio"),
    "clean": (".monitor.clean", "show what lies in the project, and remove what may go"),
}

WITHOUT_TORCH = ("prepare", "data_report")  # of transformers they need the tokenizer alone


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m trainstack COMMAND ...     (each has --help)\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:<12} {text}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        fix = f"did you mean {near[0]}?" if near else f"there are: {', '.join(COMMANDS)}"
        print(f"trainstack: error: no command {name}; {fix}", file=sys.stderr)
        return USAGE_ERROR
    module, _ = COMMANDS[name]
    try:
        return importlib.import_module(module, "trainstack").main(arguments[1:])
    except ConfigError as error:
        print(error.report(name), file=sys.stderr)
        return error.code


def hide_torch() -> None:
    """Let transformers take torch for not installed: importing it would be most of the time."""
    sys.modules["torch"] = None
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that it is not there


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in WITHOUT_TORCH:
        hide_torch()
    run_command(main)
