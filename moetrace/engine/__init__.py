"""The replay, in Numba: where, who, what stays, what moves early, and what it costs."""
