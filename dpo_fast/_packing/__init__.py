"""How a packed batch runs through a transformers model; `dpo_fast.packing` is the public side."""
