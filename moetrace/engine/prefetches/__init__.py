"""What moves undemanded: a file a prefetch, each with its record. The folder is the registry (`spec/choices.py`)."""
