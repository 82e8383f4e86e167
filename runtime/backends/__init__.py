"""Where the modules of a plan come from: our own transformer, or Hugging Face Transformers' models."""
