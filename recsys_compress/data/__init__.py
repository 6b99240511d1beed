"""Raw data to a prepared dataset (`prepare`), a prepared dataset to batches (`reader`)."""
