"""What belongs to this machine: child processes, the local stack, the terminal."""
