"""Run a local Hugging Face model, and trace its routing."""
