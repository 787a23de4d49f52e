"""What the GPU keeps: a file a residency, each with its record. The folder is the registry (`spec/choices.py`)."""
