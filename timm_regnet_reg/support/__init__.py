"""What the commands share; none of them imports another."""
