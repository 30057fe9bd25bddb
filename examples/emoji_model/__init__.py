"""The stages of `train_emoji.py`, one file each."""
