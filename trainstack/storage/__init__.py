"""Everything that reaches a disk, and where it is.

files.py        changes that survive a crash, each announced first
manifest.py     folders that are whole, or not there
layout.py       where models, data sets and runs are
kept_folder.py  what a job leaves to the next, on a disk of each node
"""
