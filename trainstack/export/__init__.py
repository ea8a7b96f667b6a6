"""What others need to use a model: an ordinary folder of Hugging Face, and its card.

command.py  python -m trainstack export
source.py   the checkpoint that is meant, and what is known of it
folder.py   the folder: whole, or not there
model.py    its files, and whether they are the checkpoint's model
card.py     README.md
"""
