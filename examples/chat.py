"""A chat that keeps its cache between turns, so that each turn computes its new tokens only.

    python examples/chat.py MODEL_FOLDER [QUESTION ...]

MODEL_FOLDER has a model with the chat format of SmolLM2, e.g. the one that `vattn demo` unpacks. Without questions the
script reads them from the terminal, until an empty line.
"""

import argparse
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vattn

parser = argparse.ArgumentParser(description="A chat that keeps its cache between turns.")
parser.add_argument("folder", metavar="MODEL_FOLDER", help="of a model, e.g. the one that `vattn demo` unpacks")
parser.add_argument("questions", metavar="QUESTION", nargs="*", help="what to ask; else it is read from the terminal")
options = parser.parse_args()


def questions() -> Iterator[str]:
    if options.questions:
        yield from options.questions
    else:
        while line := input("> "):
            yield line


tokenizer = AutoTokenizer.from_pretrained(options.folder, local_files_only=True)
model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, local_files_only=True)
cache = vattn.VirtualCache(model, max_len=4096)
tokens = torch.empty(1, 0, dtype=torch.long)  # the whole conversation; the cache has the rows of all but the last token

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
