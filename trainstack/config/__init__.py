"""What a run is: config.yaml, read strictly."""
