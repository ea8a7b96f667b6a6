"""A run in Weights & Biases, trackio or TensorBoard, read from its files."""
