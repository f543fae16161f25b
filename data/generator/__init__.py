"""The pieces of `data/generate.py`; standard library only."""
