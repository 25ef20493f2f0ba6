"""Training: builds a training from a recipe and runs its loop."""
