"""What vattn knows about transformers' models: how they compute attention, and what else their steps depend on."""
