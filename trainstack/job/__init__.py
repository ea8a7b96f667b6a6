"""From the command to the ranks, and from their end to what follows.

submit.py     all checks before the queue
resources.py  what the job asks of Slurm
inputs.py     model, data, tokens and space
freeze.py     the copy that a job runs
attempts.py   begins and ends an attempt
verdict.py    what follows the end of an attempt
blame.py      which rank is to blame
launch.py     torchrun that reports and saves
preflight.py  what nodes need to meet
"""
