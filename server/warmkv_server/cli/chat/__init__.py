"""`warmkv chat`: a conversation with an agent, in a terminal or through a pipe."""
