"""Load, evaluate and export one trained model, and predict with it."""
