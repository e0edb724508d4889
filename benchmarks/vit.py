"""A small vision transformer on Fashion-MNIST, with AdamW: a network that had no part in finding the library's recipe.

    python benchmarks/vit.py                 # runs what vit.jsonl lacks, then prints the table
    python benchmarks/vit.py --only REGEX    # those whose name, as printed, matches
    python benchmarks/vit.py --table         # only prints it

Four encoder blocks of PyTorch (norms first, GELU, width 96, 4 heads, 442,000 weights in their linear layers) see 16 patches of 7 by 7 pixels. Three epochs of 60,000 images in batches of 128, without augmentation;
AdamW with torch's defaults but for the learning rate: .002 (for the dense network better than .001 and .004 after one epoch), after a warm-up of 100 steps a cosine to zero. Sparse networks have the same share of weights in each layer
of the blocks; the layer of the patches, norms and the head stay dense. `small dense` is narrower and has two heads, with about as many weights in its blocks as the sparse network has active ones. Methods are the presets.

Accuracy is that of the last step on the 10,000 test images, in [0,1]. Each run is one thread, in plain PyTorch, and masked."""
import time
import torch
from torch import nn
from torch.nn import functional as F
from sparsefast.all import *
from sparsefast.find import sparse_layers
from sparsefast.presets import presets_by_name
from deploy import hardware
from methods import data, lr_at
from records import Records, run_lacking, spread, where, words

records = Records(__file__)
settings = dict(lr=2e-3, lr_warmup=100, epochs=3, bs=128, width=96, heads=4, blocks=4)
small = {0.9: 30, 0.95: 22, 0.98: 14}                                        # widths with about as many weights as are active; with two heads
methods = ('static', 'SET', 'RigL', 'RigL_avg', 'CHTs', 'TopKAST', 'GMP', 'GraNet')
seeds = (0, 1, 2)

class ViT(nn.Module):
    "Patches of 7 by 7 pixels, encoder blocks, and the mean of their outputs"
    def __init__(self, width, heads, blocks):
        super().__init__()
        self.patch,self.pos = nn.Conv2d(1, width, 7, 7),nn.Parameter(0.02*torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4*width, dropout=0., activation='gelu', batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        for p in self.blocks.parameters():                                   # the copies of a layer begin alike
            if p.dim()==2: nn.init.xavier_uniform_(p)
        self.norm,self.head = nn.LayerNorm(width),nn.Linear(width, 10)
    def forward(self, x): return self.head(self.norm(self.blocks(self.patch(x).flatten(2).mT+self.pos)).mean(1))

def weights_of(blocks): return sum(p.numel() for p in blocks.parameters() if p.dim()==2)

def train(dsets, name, sparsity, seed):
    "One run from start to end; returns its record"
    s,start,((x,y),(xt,yt)) = settings,time.process_time(),dsets
    n_iter = len(x)//s['bs']
    total,step = n_iter*s['epochs'],0
    torch.manual_seed(seed)
    model = ViT(small[sparsity], 2, s['blocks']) if name=='small dense' else ViT(s['width'], s['heads'], s['blocks'])
    method = None if 'dense' in name else DSTMethod(**{**presets_by_name()[name.lower()], 'seed': seed}).in_steps(total, n_iter)
    if method: sparsify_model(model, sparsity, exclude=['patch', 'head'], **{'sparse_f': uniform_sparsity, **method.sparsify_kwargs(sparsity)})
    opt,gen = torch.optim.AdamW(model.parameters(), lr=s['lr']),torch.Generator().manual_seed(seed)
    for _ in range(s['epochs']):
        for idx in torch.randperm(len(x), generator=gen)[:n_iter*s['bs']].view(n_iter, -1):
            step += 1
            for g in opt.param_groups: g['lr'] = lr_at(step, total, s['lr_warmup'], s['lr'])
            F.cross_entropy(model(x[idx]), y[idx]).backward()
            if method: method.step(model, opt, step, total=total)
            else: opt.step()
            opt.zero_grad()
    model.eval()
    with torch.no_grad(): right = torch.cat([model(b) for b in xt.split(1000)]).argmax(1)==yt
    weights = weights_of(model.blocks)
    active = sum(int(l.nnz) for l in sparse_layers(model)) if method else weights
    return dict(name=words(name, sparsity, seed), method=name, sparsity=sparsity, seed=seed, accuracy=round(right.float().mean().item(), 4), weights=weights, active=active,
                cpu_seconds=round(time.process_time()-start, 1), **settings, **hardware(1))

def plan():
    "All runs: (method, sparsity, seed), the most telling first"
    cells = [(0.95, 0), (0.95, 1), (0.9, 0), (0.95, 2), (0.9, 1), (0.9, 2), (0.98, 0)]
    runs = [run for s,seed in cells for run in (('dense', 0., seed), *((n, s, seed) for n in ('small dense', *methods)))]
    return list(dict.fromkeys(runs))

done = records.done

def accuracies(name, sparsity): return [100*r['accuracy'] for r in done().values() if (r['method'], r['sparsity'])==(name, sparsity)]

def table():
    "Accuracy in percent, mean, standard deviation and number of seeds, as Markdown"
    cols = sorted({r['sparsity'] for r in done().values()}-{0.})
    rows = ['| | ' + ' | '.join(f'{s:.0%}' for s in cols) + ' |', '|---|' + '---:|'*len(cols)]
    cells = {'dense': [spread(accuracies('dense', 0.)) for _ in cols], **{n: [spread(accuracies(n, s)) for s in cols] for n in ('small dense', *methods)}}
    return '\n'.join([*rows, *(f"| {n} | {' | '.join(c)} |" for n,c in cells.items() if any(c))])

def setting(): return where(done().values(), 'processor')

if __name__=='__main__': run_lacking(__doc__, records, plan, words, data, train, table, 'accuracy')
