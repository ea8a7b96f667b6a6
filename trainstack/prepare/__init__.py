"""Documents become tokens, once, before the first run.

prepare.py    command: from data sets to token stores
readers.py    data files become records
formats.py    a record becomes a document
chat.py       conversations by the tokenizer's chat template
tokenizer.py  the model's tokenizer; documents become tokens
tokenise.py   data files become tokens, by several processes
packing.py    which documents share a sample
writer.py     writes a store, which can be resumed
demo.py       the built-in data set and model
"""
