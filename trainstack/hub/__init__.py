"""Models and data sets arrive here, whole: from the Hub, or as links to local files.

fetch.py       python -m trainstack hub: look, fetch, swap
asset.py       the models and data sets that are named
choose.py      which files of a model to take, which to refuse
weights.py     the files of weights
data_files.py  the files of a data set, its subsets and splits
commit.py      an origin: a commit on the Hub
push.py        the other way: a folder becomes a commit
local.py       an origin: files of this machine
"""
