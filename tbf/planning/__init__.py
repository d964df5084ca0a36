"""What a run will need of its machine, worked out before anything is allocated."""
