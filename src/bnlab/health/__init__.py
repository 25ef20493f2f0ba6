"""The health of batch normalisation: the monitor that training runs, and what it finds."""
