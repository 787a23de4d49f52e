"""How kernels are compiled, and what they share; the only room that touches Numba's insides."""
