"""How good a model is.

held_out.py  the loss on held-out data
samples.py   what it says to the prompts of a configuration
command.py   python -m trainstack eval: both, of a checkpoint or any model
"""
