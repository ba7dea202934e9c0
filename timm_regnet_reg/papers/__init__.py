"""What measures the networks and reproduces the papers."""
