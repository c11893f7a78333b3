"""What rooms pass to each other: values alone, with no code of any room behind them."""
