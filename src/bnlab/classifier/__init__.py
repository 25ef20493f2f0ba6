"""The classifier file, and what is done with one: predict, evaluate."""
