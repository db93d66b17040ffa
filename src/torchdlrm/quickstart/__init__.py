"""What the quickstart compares models with: logistic regression, and models that live otherwise."""
