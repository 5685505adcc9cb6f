"""Self-supervised objectives: one file each, found by the file's name."""
