"""The checks, one file each, named after the fault. Every file is listed here; `registry.py` reads them."""
