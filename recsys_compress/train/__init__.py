"""One trainer for every method: phases in, metrics out."""
