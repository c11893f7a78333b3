"""From logits to an answer: choosing tokens, and their text."""
