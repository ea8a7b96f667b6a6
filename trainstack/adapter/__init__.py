"""LoRA: small matrices beside the layers of a model that stays as it is.

base.py   the model that an adapter belongs to; loads no torch
lora.py   the matrices: made by peft, loaded, and as a checkpoint stores them
layer.py  a layer with its matrices
"""
