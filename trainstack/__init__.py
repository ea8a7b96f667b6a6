"""Train language models with PyTorch DDP on Slurm: clone, edit, submit.

A room is a package of this folder. Single files, below and above the rooms:

errors.py       what a person is told; exit codes of mistakes
processes.py    how a process ends, and whether it is alive
units.py        sizes, durations and moments in words
waits.py        who waits how long for whom
distributed.py  ranks, device, process group, logging
__main__.py     python -m trainstack: all commands

Rooms, in the order of imports; the docstring of each lists its files:

storage/     everything that reaches a disk
config/      what a run is
checkpoint/  whole or not there
run/         the folder of a run
chat/        conversations, and what is learned of them
data/        what a step consumes
records/     data files become records
prepare/     documents become tokens
hub/         models and data sets arrive
optim/       how weights change
adapter/     LoRA
model/       the network, its loss, how it is spread
evaluation/  how good a model is
resilience/  what keeps a run safe, or ends it
plan/        what a run will need and take
train/       the parts of train.py's loop
job/         from the command to the ranks
history/     what a run did, from its records
monitor/     what runs do, and did
report/      a page about a run
trackers/    Weights & Biases, trackio
export/      a model for others
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
