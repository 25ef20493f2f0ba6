"""Pictures and pages: what a training or an evaluation looks like."""
