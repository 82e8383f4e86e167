"""What each training engine can run: rules of degrees and of stages, and recipes that it can express."""
