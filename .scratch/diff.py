import sys

sys.path.insert(0, "bench")

import memory
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache

from vattn import VirtualCache

cfg = memory.LLAMA_3_8B
import copy

cfg = copy.deepcopy(cfg)
cfg.num_hidden_layers = 8
cfg.layer_types = None
with torch.device("cuda"):
    torch.manual_seed(0)
    m = AutoModelForCausalLM.from_config(cfg, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
m.generation_config.eos_token_id = None


def logits(make, batch=1, n=1000, steps=4, rec=None):
    c = make()
    ids = memory.prompts(batch, n)["input_ids"]
    out = []
    with torch.no_grad():
        o = m(ids, past_key_values=c, use_cache=True, logits_to_keep=1).logits[:, -1]
        out.append(o)
        torch.manual_seed(5)
        for i in range(steps):
            t = torch.randint(1, 1000, (batch, 1), device="cuda")
            o = m(t, past_key_values=c, use_cache=True).logits[:, -1]
            out.append(o)
    return out, c


D = lambda: DynamicCache(config=cfg)
V = lambda: VirtualCache(cfg, max_len=16384)
C = lambda: VirtualCache(cfg, max_len=16384, layout="compact")


def cmp(a, b):
    return [float((x - y).abs().max()) for x, y in zip(a, b)]


for b, n in ((1, 1000), (1, 1024), (8, 2048)):
    d1, _ = logits(D, b, n)
    d2, _ = logits(D, b, n)
    v1, vc = logits(V, b, n)
    v2, _ = logits(V, b, n)
    c1, _ = logits(C, b, n)
    print(
        b,
        n,
        "DD",
        cmp(d1, d2),
        "VV",
        cmp(v1, v2),
        "DV",
        cmp(d1, v1),
        "DC",
        cmp(d1, c1),
        "scale",
        float(d1[0].abs().max()),
        "top2 gap",
        [float((x.topk(2).values[:, 0] - x.topk(2).values[:, 1]).min()) for x in d1],
    )
    for be in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ):
        try:
            with sdpa_kernel(be):
                d1, _ = logits(D, b, n)
                v1, _ = logits(V, b, n)
            print(be, "DV", cmp(d1, v1))
        except Exception as e:
            print(be, str(e)[:80])
# kernel used
from torch.profiler import ProfilerActivity, profile

for name, mk in (("D", D), ("V", V)):
    c = mk()
    ids = memory.prompts(1, 1000)["input_ids"]
    with torch.no_grad():
        m(ids, past_key_values=c, use_cache=True, logits_to_keep=1)
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            m(ids[:, :1], past_key_values=c, use_cache=True)
            torch.cuda.synchronize()
    print(name, sorted({e.key[:90]: e.count for e in p.key_averages()}.items(), key=lambda x: -x[1])[:14])
# raw kernel test
q = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
k = torch.randn(1, 8, 1001, 128, device="cuda", dtype=torch.bfloat16)
v = torch.randn_like(k)
import torch.nn.functional as F

ks = torch.empty(1, 1001, 64, 8, 128, device="cuda", dtype=torch.bfloat16)[:, :, 0].transpose(1, 2)
ks.copy_(k)
vs = torch.empty(1, 1001, 64, 8, 128, device="cuda", dtype=torch.bfloat16)[:, :, 0].transpose(1, 2)
vs.copy_(v)
print(
    "raw",
    (
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        - F.scaled_dot_product_attention(q, ks, vs, enable_gqa=True)
    )
    .abs()
    .max(),
)
