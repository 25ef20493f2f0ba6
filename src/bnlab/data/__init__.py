"""Photos: find them, find duplicates among them, split them, and read them in batches."""
