"""Conversations as the model's chat template writes them, and what of them is learned.

template.py   Chat: the template of a model folder, and a conversation written by it
marks.py      which part of a rendering is whose text
turns.py      where a turn of the assistant begins and ends in a rendering
ends.py       which tokens end turns
checks.py     what was said is there, whole
ways.py       the shapes in which templates read a conversation
messages.py   the messages of a record, whatever its roles and columns are called
"""
