"""Questions about a trace that need no hardware: statistics of its routing, without any machine."""
