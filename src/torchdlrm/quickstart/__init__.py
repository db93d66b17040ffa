"""What the quickstart compares models with: logistic regression, models from scratch and frozen ones."""
