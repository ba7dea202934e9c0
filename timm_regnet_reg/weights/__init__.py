"""What makes, checks and moves a folder of weights."""
