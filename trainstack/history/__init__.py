"""What a run did, from its records.

attempts.py  the attempts of a run, and the steps of each
goodput.py   where its time went, by cause
settings.py  its settings beside those that were shipped
ledger.py    the proof that every sample came once
"""
