"""What leaves the house: merged models, other formats."""
