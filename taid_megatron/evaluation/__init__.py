"""How good a checkpoint is: held-out text, its teacher, last words, public suites. Read run.py."""
