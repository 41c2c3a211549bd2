"""GGUF files as mlx-lm models: the header, the weights and the tokenizer of one file or of its parts."""
