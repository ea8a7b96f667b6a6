"""What a step consumes: the data sets as tokens, and their order.

store.py    the token store on disk, and its key
split.py    one split of a store, and its samples
writer.py   writes a store, which can be resumed
packing.py  which documents share a sample
corpus.py   the stores of all data sets as one
order.py    which samples a step consumes
feed.py     the batches of a step
duplicates.py  documents that are there more than once
report.py   command: what would be learned, counted and shown
"""
