"""From the command to the ranks."""
