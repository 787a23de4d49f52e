"""Who runs an expert: a file a dispatch, each with its record. The folder is the registry (`spec/choices.py`)."""
