"""What vattn knows of transformers' models: the attention they compute by, and what else their steps depend on."""
