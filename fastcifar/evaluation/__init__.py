"""One trained model: load, evaluate, predict, export."""
