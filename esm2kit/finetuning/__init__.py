"""Fine-tune an encoder with a head on labels, and predict with the result."""
