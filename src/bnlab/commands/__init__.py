"""One file a verb: `run(options, progress)` does the work and returns a result. Nothing here prints."""
