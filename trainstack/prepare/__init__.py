"""Documents become tokens, once, before the first run.

prepare.py     command: from data sets to token stores
formats.py     a record becomes a document
tokenizer.py   the model's tokenizer; documents become tokens
long_texts.py  long texts in parts, with the tokens of the whole
tokenise.py    data files become tokens, by several processes
held_out.py    which documents are held out
told.py        what people are told of a store
earlier.py     stores that the rules before made
demo.py        the built-in data set and model
"""
