"""Pictures for others, and many of them; all are drawn by `rows.py`. The command line reads this file without torch."""

BATCH_LAYOUTS = ("webdataset", "files")
BATCH_OUTPUTS = ("png", "jpg", "webp", "tokens")
