"""A run in Weights & Biases or trackio, read from its files by a process of its own.

command.py     which trackers, and each with its own packages
feed.py        what is shown once and for all: follows a job, or sends what is new
to_wandb.py    into the run's folder, or to the server
to_trackio.py  into a database
"""
