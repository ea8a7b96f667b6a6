"""Checkpoints: whole or not there, written during training.

state.py        TrainState: what one remembers beside tensors
names.py        which checkpoints a run has; loads no torch
snapshot.py     what one holds; which rank writes what
host_memory.py  where it is copied to
saver.py        copy, then write in a thread
publish.py      write, agree, seal, rename: the protocol
tensorfile.py   tensors as a safetensors file
load.py         the newest one that verifies
interval.py     how often to save, if save_steps is auto
"""
