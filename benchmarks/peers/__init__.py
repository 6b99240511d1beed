"""The libraries that users would otherwise take, on the same data and model as ours."""
