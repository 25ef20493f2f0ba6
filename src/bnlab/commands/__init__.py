"""One file a verb: `run(options, progress)` does the work and returns a result. Nothing here prints.

A command raises a BnlabError if an option or the data cannot be used, or if the disk or memory is full. Ctrl-C raises
KeyboardInterrupt (Interrupted, if something was saved); nothing unfinished is left behind.
"""
