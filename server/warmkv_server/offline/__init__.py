"""What operators do to a data directory beside a server or without one: look, verify, clean up, move agents."""
