"""What every wing stands on: files that are written whole or not at all, weights, number formats."""
