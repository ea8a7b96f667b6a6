"""The folder of a run: who owns it, what it says."""
