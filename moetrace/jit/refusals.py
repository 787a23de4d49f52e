"""Why a user's function is not compiled, in the words that Numba is given and that its errors are looked through for."""

READS_ONLY = "it writes into what is for reading"
RETURNS = "returns a value, but a policy returns nothing: it writes into plan or state."
