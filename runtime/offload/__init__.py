"""What of a stage lies in host memory: masters and optimizer state, or activations of its blocks."""
