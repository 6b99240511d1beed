"""The quality study: its cells and claims, their runs, the kept figures and the page."""
