"""What a trained model is asked afterwards: text, and its loss."""
