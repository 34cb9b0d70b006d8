"""A chat that keeps its cache between turns: each turn computes its own tokens only.

    python examples/chat.py MODEL_FOLDER [QUESTION ...]

Without questions it reads them from the terminal, until an empty line.
"""

import sys
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vattn


def questions() -> Iterator[str]:
    if sys.argv[2:]:
        yield from sys.argv[2:]
    else:
        while line := input("> "):
            yield line


folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
cache = vattn.VirtualCache(model, max_len=4096)
tokens = torch.empty(1, 0, dtype=torch.long)  # the whole conversation; the cache holds all of it but the last token

for question in questions():
    turn = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    turn = turn if tokens.numel() == 0 else f"\n{turn}"
    prompt = torch.cat([tokens, tokenizer(turn, return_tensors="pt", add_special_tokens=False).input_ids], dim=1)
    known = cache.get_seq_length()
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **{vattn.CACHE_KEYWORD: cache},
        max_new_tokens=60,
        do_sample=False,
    )
    answer = tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    print(f"{answer}\n[{known} of {prompt.shape[1]} prompt tokens were in the cache]\n")
