"""The model zoo: architectures, recipes, stacked training, measured properties."""
