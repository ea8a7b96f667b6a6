"""Models and data sets arrive here, whole."""
