"""How runs are, as people ask.

screen.py     the entry of monitor.sh
view.py       one run as it is now
health.py     how it is, in a word
table.py      all runs, a line for each
one_run.py    one run's screen
why.py        what happened to a run, and how that is known
aftermath.py  what it cost, what was done, and what to do now
drawing.py    tables and curves made of characters
clean.py      what lies in the project, and what may go
"""
