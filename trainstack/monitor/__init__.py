"""What runs do, and what they did.

view.py     one run as it is now
screen.py   the table of all runs; one run's screen
why.py      what happened to a run, and what to do now
history.py  the attempts of a run, from its records
goodput.py  where a run's time went, by cause
clean.py    what lies in the project, and what may go
ledger.py   the proof that every sample came once
"""
