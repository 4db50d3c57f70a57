"""Before a run: does it fit, how long will it take, and is the machine ready. No GPU is needed."""
