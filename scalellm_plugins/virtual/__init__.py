"""`scalellm simulate`: the real scheduler on a simulated GPU in virtual time."""
