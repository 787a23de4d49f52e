"""Questions about a trace that need no hardware: what its routing is like, before any machine enters."""
