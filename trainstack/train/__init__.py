"""The parts of train.py's loop.

attempt.py   what this attempt was asked to do
startup.py   before the first step: ownership, checkpoint, state
announce.py  every number that decides the run, said first
numbers.py   a step's numbers, read one step late
requests.py  who wants to stop, or to save
evaluate.py  loss on held-out data; a sample of text
report.py    log lines, files and status of the loop
metrics.py   the formats of metrics.jsonl, samples.jsonl, TensorBoard
ending.py    how a run is left: paused or done
"""
