"""What keeps a run safe, or ends it."""
