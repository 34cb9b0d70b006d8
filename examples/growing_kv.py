"""K and V as plain tensors that grow in place, read by an unmodified attention kernel.

    python examples/growing_kv.py [cpu|cuda]

The script prints the same map and the same counts on both devices.
"""

import argparse

import torch
from torch.nn.functional import scaled_dot_product_attention

import vattn

parser = argparse.ArgumentParser(description="K and V as plain tensors that grow in place.")
parser.add_argument("device", nargs="?", choices=["cpu", "cuda"], default="cpu")
device = parser.parse_args().device
torch.manual_seed(0)
layers, kv_heads, heads, head_dim = 32, 8, 32, 128
dtype = torch.float32 if device == "cpu" else torch.bfloat16

layout = vattn.KVLayout.uniform(layers=layers, kv_heads=kv_heads, head_dim=head_dim, max_len=131072, dtype="bfloat16")
# Without the mapper, a background thread, the calls below make the driver calls: each run has the same counts.
with vattn.KVCache(layout, slots=4, device=device, mapper=False) as cache:
    print(f"{layout.bytes_per_token // 1024} KiB a token, {layout.tokens_per_granule:g} tokens a granule")
    k = cache.k(0)
    print(f"k(0) is {tuple(k.shape)}: {k.numel() * layers * 2 * 2 / 2**40:.3f} TiB of addresses for all layers")

    a, b = cache.open(), cache.open()
    address = a.k(0).data_ptr() if a.grow(1) else 0
    a.grow(99)  # a prompt of 100 tokens
    b.grow(33)
    for _ in range(60):  # and 60 tokens, one by one
        for sequence in (a, b):
            position = sequence.grow(1) - 1
            for layer in (0, layers - 1):
                sequence.k(layer)[position] = torch.randn(kv_heads, head_dim, device=device)
                sequence.v(layer)[position] = torch.randn(kv_heads, head_dim, device=device)
    assert a.k(0).data_ptr() == address

    query = torch.randn(1, heads, 1, head_dim, device=device, dtype=dtype)
    keys, values = (tensor.to(dtype).transpose(0, 1)[None] for tensor in (a.k(0), a.v(0)))
    out = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    print(f"attention over {a.length} positions: {tuple(out.shape)}, finite: {bool(out.isfinite().all())}")

    b.close()
    with cache.open(expected=50) as c:
        c.grow(50)
        print(f"the new sequence took over slot {c.slot}, which was parked")
        print(cache.show())
    stats = cache.stats()
    print({name: count for name, count in stats.driver_calls.items() if count and name not in ("wait", "record")})
