"""Other ways to serve the same model, asked the same questions in the same run."""
