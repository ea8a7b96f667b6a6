"""Everything that reaches a disk, and where it is."""
