"""Where experts live: a file a placement, each with its record. The folder is the registry (`spec/choices.py`)."""
