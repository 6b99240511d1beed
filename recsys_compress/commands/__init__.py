"""Commands of the command line, by theme; `recsys_compress.cli` puts them together."""
