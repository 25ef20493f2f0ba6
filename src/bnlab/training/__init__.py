"""Training: one loop, and what stands around it."""
