"""The folder of a run: who owns it, and what it says.

states.py    states, exit codes, phases of the loop
folder.py    status, history, failure reports, left-out data
lease.py     one owner: an attempt of a job
owner.py     may it be submitted? not while another job has it
refusal.py   what submit.sh said when it refused
queue.py     what Slurm says of jobs, and its meaning
nodes.py     what Slurm says of nodes
identity.py  which settings may change, which not
branch.py    a run that begins as a checkpoint of another
"""
