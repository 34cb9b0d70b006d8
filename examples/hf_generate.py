"""An unmodified Hugging Face model with a KV cache that grows in place.

    python examples/hf_generate.py MODEL_FOLDER [DEVICE]

MODEL_FOLDER has any causal language model that transformers loads, e.g. the one that `vattn demo` unpacks.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vattn

parser = argparse.ArgumentParser(description="An unmodified Hugging Face model on a KV cache that grows in place.")
parser.add_argument("folder", metavar="MODEL_FOLDER", help="of a model, e.g. the one that `vattn demo` unpacks")
parser.add_argument("device", metavar="DEVICE", nargs="?", default="cpu", help="cpu (default) or cuda")
options = parser.parse_args()

device = options.device
tokenizer = AutoTokenizer.from_pretrained(options.folder, local_files_only=True)
model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32, local_files_only=True).to(device)
inputs = tokenizer(["The capital of France is", "Water boils at"], return_tensors="pt", padding=True).to(device)

cache = vattn.VirtualCache(model, max_len=4096)
tokens = model.generate(**inputs, **{vattn.CACHE_KEYWORD: cache}, max_new_tokens=24, do_sample=False)

for text in tokenizer.batch_decode(tokens, skip_special_tokens=True):
    print(text)
print()
print(cache.kv_caches[0].show())
stats = cache.stats()
print(f"{stats.mapped / 2**20:.0f} MiB mapped of {stats.reserved / 2**30:.1f} GiB of addresses")
print("calls:", {name: count for name, count in stats.driver_calls.items() if count})
