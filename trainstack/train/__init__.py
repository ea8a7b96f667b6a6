"""The parts of train.py's loop.

attempt.py   what this attempt was asked to do
startup.py   before the first step: ownership, checkpoint, state
announce.py  every number that decides the run, said first
numbers.py   a step's numbers, read one step late
ranks.py     their own times; a slow one is named
report.py    log lines, files and status of the loop
ending.py    how a run is left: paused or done
"""
