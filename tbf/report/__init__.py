"""One HTML page that tells what became of a run."""
