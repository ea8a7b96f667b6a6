"""The folder of a run: who owns it, and what it says.

states.py       states, exit codes, phases of the loop
folder.py       status, history, failure reports, left-out data
lease.py        one owner: an attempt of a job
queue.py        what Slurm says of jobs, and its meaning
identity.py     which settings may change, which not
environment.py  code, packages and machine of a run
"""
