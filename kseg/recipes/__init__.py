"""Recipes: training configurations with the score they reach."""
