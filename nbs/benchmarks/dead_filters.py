"""Why RigL falls behind on a convnet with batch norm at 98 %: filters without a weight, how large weights get, and what a lower learning rate does.

    python nbs/benchmarks/dead_filters.py    # some five minutes on one core; writes dead_filters.jsonl"""
import json
from itertools import product
from pathlib import Path
import torch
from fashion_mnist import data, hardware, recipe, train
from sparsefast.core import *

def look(epoch, model):
    "Filters without weights, and the largest weight, of each sparse convolution"
    convs = {nm: m for nm,m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and hasattr(m, 'weight_mask')}
    return {nm: dict(filters=len(m.weight), dead=int((~m.weight_mask.flatten(1).any(1)).sum()), largest=round(m.weight.abs().max().item(), 2)) for nm,m in convs.items()}

out = Path(__file__).with_suffix('.jsonl')

def table():
    "What the runs came to, as Markdown"
    rows = ['| learning rate | method | accuracy | filters without a weight, by layer | largest weight |', '|---:|---|---:|---:|---:|']
    for r in map(json.loads, out.read_text().splitlines()):
        dead = ', '.join(f"{v['dead']} of {v['filters']}" for v in r['last'].values())
        rows.append(f"| {r['lr']} | {r['method']} | {r['accuracy']:.2%} | {dead} | {max(v['largest'] for v in r['last'].values()):,.1f} |")
    return '\n'.join(rows)

if __name__=='__main__':
    torch.set_num_threads(1)
    dsets,rows = data(), []
    for lr,method in product((0.1, 0.02), ('static', 'RigL')):
        recipe['lr'],seen = lr,[]
        rec = train('convnet', method, 0.98, 0, dsets, after_epoch=lambda e, m: seen.append(look(e, m)))
        rows.append({**rec, **hardware(), 'lr': lr, 'last': seen[-1]})
        print(lr, method, rec['accuracy'], seen[-1], flush=True)
    out.write_text(''.join(json.dumps(r)+'\n' for r in rows))
