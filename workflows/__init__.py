"""What an agent is and decides: deterministic, without I/O."""
