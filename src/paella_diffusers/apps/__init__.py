"""Pictures for others, and many of them; all are drawn by `rows.py`."""
