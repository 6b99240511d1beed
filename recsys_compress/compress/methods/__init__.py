"""One method a file; every file here is found and registered by itself."""
