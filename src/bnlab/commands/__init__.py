"""One file a verb: `run(settings, progress)` does it and gives back a result; nothing here prints."""
