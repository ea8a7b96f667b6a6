"""What a step consumes."""
