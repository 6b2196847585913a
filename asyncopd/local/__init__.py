"""What belongs to this machine: child processes, the local stack, Prefect's API, the terminal."""
