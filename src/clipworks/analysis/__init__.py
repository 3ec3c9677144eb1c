"""What a model sees, and how its space is shaped."""
