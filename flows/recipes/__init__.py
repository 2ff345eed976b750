"""Recipes that come with the package, found by name: `coldpress run smollm2-branching`."""
