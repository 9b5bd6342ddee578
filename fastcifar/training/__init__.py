"""One run: `train.py` reads first."""
