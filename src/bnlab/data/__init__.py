"""Photos: found, read, told apart, split, and made into batches."""
