"""Why RigL fails on a convnet with batch norm at 98 %: filters without a weight, and how large weights get.

    python nbs/benchmarks/dead_filters.py    # some five minutes on one core; writes dead_filters.jsonl"""
import json
from pathlib import Path
import torch
from fashion_mnist import data, hardware, train
from sparsefast.core import *

def look(epoch, model):
    "Filters without weights, and the largest weight, of each sparse convolution"
    convs = {nm: m for nm,m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and hasattr(m, 'weight_mask')}
    return {nm: dict(filters=len(m.weight), dead=int((~m.weight_mask.flatten(1).any(1)).sum()), largest=round(m.weight.abs().max().item(), 2)) for nm,m in convs.items()}

if __name__=='__main__':
    torch.set_num_threads(1)
    dsets,rows = data(), []
    for method in ('static', 'RigL', 'RigL, each epoch'):
        seen = []
        rec = train('convnet', method, 0.98, 0, dsets, after_epoch=lambda e, m: seen.append(look(e, m)))
        rows.append({**rec, **hardware(), 'last': seen[-1]})
        print(method, rec['accuracy'], seen[-1], flush=True)
    Path(__file__).with_suffix('.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
