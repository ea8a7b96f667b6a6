"""Train language models with PyTorch DDP on Slurm: clone, edit, submit."""
