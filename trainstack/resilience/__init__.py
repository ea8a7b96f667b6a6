"""What keeps a run safe, or ends it.

stop.py      when to save and stop
watchdog.py  a step that never ends
guard.py     is this update good?
slow_ranks.py  who takes longer than the others
evidence.py  what may explain it, on its host
failure.py   what a rank leaves when it fails
kinds.py     whose a failure is, and whether another attempt can help
faults.py    faults on demand, for tests
"""
