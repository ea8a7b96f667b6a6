"""How weights change.

optimizer.py  what every optimizer of ours can do
adamw.py      fused AdamW whose update can be withheld
schedule.py   the learning rate as a function of the step
"""
