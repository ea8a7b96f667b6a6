"""The network, its loss, and how it is spread over the ranks.

causal_lm.py   a causal LM of transformers, built and named
loss.py        its next-token loss, in chunks
trial.py       what a model's own code makes of a few tokens
attention.py   without masks; documents of a row do not see each other
strategy.py    Strategy: how the model is spread, what the loop asks
ddp.py         the whole model on every rank
proof.py       python -m trainstack prove: can it be trained as configured?
rehearsal.py   a small copy of it is trained for a step
small_copy.py  what makes a configuration small
"""
