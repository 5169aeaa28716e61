"""Uses a trained model: text from it, and its loss."""
