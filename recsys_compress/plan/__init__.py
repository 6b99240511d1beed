"""Budget planning: bytes in, what each table should be out."""
