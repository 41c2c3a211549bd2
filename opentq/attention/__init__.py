"""Attention: how packed bytes become an output. `dispatch` asks the candidates, `reference` judges them."""
