"""Train language models with PyTorch DDP on Slurm: clone, edit, submit.

A room is a package of this folder. Single files, below and above the rooms:

errors.py       what a person is told; exit codes of mistakes
options.py      --home, --config, key=value of all commands
processes.py    how a process ends, and whether it is alive
units.py        sizes, durations and moments in words
waits.py        who waits how long for whom
distributed.py  ranks, device, process group, logging
__main__.py     python -m trainstack: all commands

The rooms, in the order of imports: doc/architecture.md. The docstring of each lists its files.
"""

import gc
import importlib.util
import sys

gc.set_threshold(50_000)  # imports make no garbage, and looking for it is a seventh of their time

needed = ("pydantic", "torch")  # a system's Python may have the first
if sys.version_info < (3, 11) or not all(map(importlib.util.find_spec, needed)):
    sys.exit(
        f"trainstack: error: {sys.executable} is not the Python that setup.sh made; write: "
        'source env.sh; "$TRAINSTACK_PYTHON" ...'
    )
