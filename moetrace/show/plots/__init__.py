"""Pictures of analyses, as files."""
