"""What runs do, and did."""
