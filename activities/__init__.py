"""What an agent does to the world: one module for each outside system."""
