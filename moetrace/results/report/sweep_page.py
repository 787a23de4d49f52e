"""x"""
def sweep_page(s): return b""
