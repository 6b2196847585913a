"""The run log as SQL relations: what they are, what is in them now, and how anyone may ask. Only reads."""
