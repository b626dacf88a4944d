"""How ids lie in a file: cut at any size, decoded, and refused, encoding by encoding."""
