from pathlib import Path

RECIPES = Path(__file__).parents[3] / "launch" / "recipes"
