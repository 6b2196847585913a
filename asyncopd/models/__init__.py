"""The student on the way: build, load and serialise it, one packed forward pass, and how tokens are drawn."""
