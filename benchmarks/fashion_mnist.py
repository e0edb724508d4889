"""Fashion-MNIST: dense, static, SET, SNFS and RigL at three sparsities, from the same initial weights and batches.

    python benchmarks/fashion_mnist.py            # runs what fashion_mnist.jsonl lacks, then prints the table
    python benchmarks/fashion_mnist.py --table    # only prints it

Each run is one thread, plain PyTorch and `DSTMethod.step`. Runs are independent: several processes can share the work (`--part 0/2`, `--part 1/2`).
Accuracy is that of the last epoch on the 10,000 test images. `nnz` counts all weights of linear layers and convolutions that are not zero."""
import argparse, json, math, platform
from itertools import product
from pathlib import Path
from statistics import mean, stdev
import torch
from torch import nn
from torch.nn import functional as F
from sparsefast.all import *
from sparsefast.cli.datasets import fashion_arrays

out = Path(__file__).with_suffix('.jsonl')
each_epoch = dict(batches_per_update=None)                                   # as published; the presets themselves have shares of training
presets = {'static': Static_presets, 'SET': SET_presets | each_epoch, 'SNFS': SNFS_presets | each_epoch, 'RigL': {**RigL_presets, 'batches_per_update': 100},
           'RigL, each epoch': {**RigL_presets, 'batches_per_update': None}}
sparsities, seeds = (0.9, 0.95, 0.98), (0, 1, 2)
recipe = dict(bs=128, lr=0.1, momentum=0.9, weight_decay=5e-4, warmup_epochs=1)
epochs = {'LeNet-300-100': 20, 'convnet': 8}

def lenet(): return nn.Sequential(nn.Flatten(), nn.Linear(784,300), nn.ReLU(), nn.Linear(300,100), nn.ReLU(), nn.Linear(100,10))

def convnet():
    conv = lambda i,o: (nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    return nn.Sequential(*conv(1,16), *conv(16,32), *conv(32,64), nn.Flatten(), nn.Linear(1024,128), nn.ReLU(), nn.Linear(128,10))

nets = {'LeNet-300-100': lenet, 'convnet': convnet}

def data():
    "Images as normalised float tensors, and labels: (train, test)"
    (x,y),(xt,yt) = [(torch.tensor(x)[:,None].float()/255, torch.tensor(y).long()) for x,y in fashion_arrays()]
    m,s = x.mean(), x.std()
    return ((x-m)/s, y), ((xt-m)/s, yt)

def lr_at(step, total, warm):
    "Linear warm-up, then a cosine to zero"
    return recipe['lr']*(step/warm if step<=warm else (1+math.cos(math.pi*(step-warm)/(total-warm)))/2)

def train(net, method, sparsity, seed, dsets, after_epoch=None):
    "One run from start to end; returns its record. `after_epoch(epoch, model)` may look at the model"
    (x,y),(xt,yt) = dsets
    torch.manual_seed(seed)
    model = nets[net]().to(memory_format=torch.channels_last)
    if method!='dense': sparsify_model(model, sparsity, erdos_renyi_sparsity)
    bs,n_iter = recipe['bs'], len(x)//recipe['bs']
    total,step = n_iter*epochs[net], 0
    opt = torch.optim.SGD(model.parameters(), lr=0., momentum=recipe['momentum'], weight_decay=recipe['weight_decay'])
    preset = presets.get(method, {})
    dst = DSTMethod(**{**preset, 'batches_per_update': preset.get('batches_per_update') or n_iter, 'seed': seed})
    batches = torch.Generator().manual_seed(seed)
    for epoch in range(epochs[net]):
        model.train()
        for idx in torch.randperm(len(x), generator=batches)[:n_iter*bs].view(n_iter, bs):
            step += 1
            for g in opt.param_groups: g['lr'] = lr_at(step, total, n_iter*recipe['warmup_epochs'])
            F.cross_entropy(model(x[idx].contiguous(memory_format=torch.channels_last)), y[idx]).backward()
            if method=='dense': opt.step()
            else: dst.step(model, opt, step, (step-1)/total)
            opt.zero_grad()
        if after_epoch: after_epoch(epoch, model)
    model.eval()
    with torch.no_grad(): acc = (torch.cat([model(b) for b in xt.split(1000)]).argmax(1)==yt).float().mean().item()
    return dict(net=net, method=method, sparsity=sparsity, seed=seed, epochs=epochs[net], accuracy=round(acc, 4),
                weights=sum(m.weight.numel() for m in sparseable_modules(model)), nnz=sum(int(m.weight.count_nonzero()) for m in sparseable_modules(model)),
                active=sum(int(mask.sum()) for _,mask,_ in sparse_params(model)))

def key(r): return r['net'], r['method'], r['sparsity'], r['seed']

def done(): return {key(r): r for r in map(json.loads, out.read_text().splitlines())} if out.exists() else {}

def plan():
    "All runs: (net, method, sparsity, seed)"
    return [(n,m,s,seed) for seed in seeds for n in nets for m,s in [('dense', 0.), *product(presets, sparsities)]]

def hardware():
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor())
    return dict(cpu=cpu, threads=torch.get_num_threads(), torch=torch.__version__, python=platform.python_version())

def table():
    "Accuracy in percent, mean and standard deviation over seeds, as Markdown"
    runs = done().values()
    def cell(net, m, s):
        a = [100*r['accuracy'] for r in runs if (r['net'],r['method'],r['sparsity'])==(net,m,s)]
        return f'{mean(a):.2f} ± {stdev(a):.2f}' if len(a)>1 else ''
    cols = (0., *sparsities)
    rows = ['| network | method | ' + ' | '.join(f'{s:.0%}' for s in cols) + ' |', '|---|---|' + '---:|'*len(cols)]
    for net,m in product(nets, ('dense', *presets)): rows.append(f'| {net} | {m} | ' + ' | '.join(cell(net, m, s) for s in cols) + ' |')
    return '\n'.join(rows)

def setting():
    "The machine and versions of the runs, in one sentence"
    where = sorted({(r['cpu'], r['threads'], r['torch'], r['python']) for r in done().values()})
    return ' '.join(f'Hardware: {cpu}, {n} thread. Versions: PyTorch {torch}, Python {python}.' for cpu,n,torch,python in where)

def gains():
    "How far each dynamic method is ahead of static, in standard errors of the difference"
    runs,lines = done().values(),[]
    acc = lambda net,m,s: [100*r['accuracy'] for r in runs if (r['net'],r['method'],r['sparsity'])==(net,m,s)]
    for net,m,s in product(nets, [m for m in presets if m!='static'], sparsities):
        a,b = acc(net, m, s), acc(net, 'static', s)
        if min(len(a), len(b))<2: continue
        se = math.sqrt(stdev(a)**2/len(a) + stdev(b)**2/len(b))
        lines.append(f'{net:14} {s:.0%} {m:16} {mean(a)-mean(b):+.2f} points, {(mean(a)-mean(b))/se:+.1f} standard errors')
    return '\n'.join(lines)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--part', default='0/1', help='this share of the runs, as i/n')
    ap.add_argument('--table', action='store_true', help='only print the tables')
    args = ap.parse_args()
    i,n = map(int, args.part.split('/'))
    if not args.table:
        torch.set_num_threads(1)
        dsets,seen = data(), done()
        for r in [r for r in plan() if r not in seen][i::n]:
            rec = {**train(*r, dsets), **hardware()}
            with out.open('a') as f: f.write(json.dumps(rec)+'\n')
            print(*key(rec), rec['accuracy'], flush=True)
    print(table(), gains(), sep='\n\n')

if __name__=='__main__': main()
