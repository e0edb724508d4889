"""Why RigL falls behind on a convnet with batch norm at 98 %: filters without a weight, how large weights get, and what a lower learning rate does.

    python benchmarks/dead_filters.py            # some ten minutes on one core; writes dead_filters.jsonl
    python benchmarks/dead_filters.py --table    # only prints the table"""
import json, sys
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import mean, stdev
import torch
from methods import data, seeds, train
from sparsefast.all import *

def look(model):
    "Filters without weights, and the largest weight, of each sparse convolution"
    convs = {nm: m for nm,m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and hasattr(m, 'weight_mask')}
    return {nm: dict(filters=len(m.weight), dead=int((~m.weight_mask.flatten(1).any(1)).sum()), largest=round(m.weight.abs().max().item(), 2)) for nm,m in convs.items()}

out = Path(__file__).with_suffix('.jsonl')

def table():
    "What the runs came to, as Markdown; counts and sizes as a range over the seeds"
    rows,runs = ['| learning rate | method | accuracy | filters without a weight, by layer | largest weight |', '|---:|---|---:|---:|---:|'], defaultdict(list)
    for r in map(json.loads, out.read_text().splitlines()): runs[r['lr'],r['method']].append(r)
    def span(vs):
        lo,hi = (f'{f(vs):,.0f}' for f in (min, max))
        return lo if lo==hi else f'{lo} to {hi}'
    for (lr,method),rs in runs.items():
        acc,layers = [100*r['accuracy'] for r in rs], [list(r['last'].values()) for r in rs]
        dead = ', '.join(f"{span([l['dead'] for l in ls])} of {ls[0]['filters']}" for ls in zip(*layers))
        rows.append(f"| {lr} | {method} | {mean(acc):.2f} ± {stdev(acc):.2f} | {dead} | {span([max(l['largest'] for l in ls) for ls in layers])} |")
    return '\n'.join(rows)

if __name__=='__main__':
    if '--table' in sys.argv: sys.exit(print(table()))
    torch.set_num_threads(1)
    dsets,rows = data(), []
    for seed,lr,method in product(seeds, (0.1, 0.02), ('static', 'RigL')):
        seen = []
        rec = train('convnet', method, 0.98, seed, dsets, look=lambda m: seen.append(look(m)), lr=lr)
        rows.append({**rec, 'last': seen[-1]})
        print(seed, lr, method, rec['accuracy'], seen[-1], flush=True)
    out.write_text(''.join(json.dumps(r)+'\n' for r in rows))
