"""A checkpoint as an ordinary folder of the Hugging Face Hub."""
