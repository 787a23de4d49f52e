"""Why a user's function is not compiled: words that Numba is given, and that are then looked for in its errors."""

READS_ONLY = "it writes into a read-only argument"
RETURNS = "returns a value, but a policy returns nothing: it writes into plan or state."
