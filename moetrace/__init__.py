"""moetrace: replay Mixture-of-Experts routing traces through serving policies on a described machine."""

__version__ = "0.1.0"
