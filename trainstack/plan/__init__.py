"""What a run will need and take, known before the queue: ``python -m trainstack plan``.

command.py      the page that a person reads, and the line of submit.sh
facts.py        what was found before, kept in the project's cache
estimate.py     memory by part, step time, hours: arithmetic alone
machine.py      GPUs by their names, with what they can do
cost.py         the operations of a micro step, found without memory
calibrate.py    how long a step takes on this processor
"""
