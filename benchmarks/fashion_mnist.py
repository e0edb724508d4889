"""Fashion-MNIST: dense, static, SET, SNFS and RigL at three sparsities, from the same initial weights and batches.

    python benchmarks/fashion_mnist.py            # runs what fashion_mnist.jsonl lacks, then prints the table
    python benchmarks/fashion_mnist.py --table    # only prints it

Each run is one thread, plain PyTorch and `DSTMethod.step`.
Accuracy is that of the last epoch on the 10,000 test images. `nnz` counts all weights of linear layers and convolutions that are not zero."""
import math
from itertools import product
from statistics import mean, stdev
import torch
from torch import nn
from torch.nn import functional as F
from sparsefast.all import *
from sparsefast.cli.datasets import fashion_arrays
from records import Records, hardware, parser, where, words

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

records = Records(__file__, key)
done = records.done

def plan():
    "All runs: (net, method, sparsity, seed)"
    return [(n,m,s,seed) for seed in seeds for n in nets for m,s in [('dense', 0.), *product(presets, sparsities)]]

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

def setting(): return where(done().values())

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
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    dsets = None if args.table else data()
    for r in [] if args.table else records.lacking(plan(), words, args.only):
        rec = records.add({**train(*r, dsets), **hardware()})
        print(words(*r), rec['accuracy'], flush=True)
    print(table(), gains(), sep='\n\n')

if __name__=='__main__': main()
