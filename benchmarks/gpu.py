"""What sparsity costs and brings on a GPU: training steps, evaluations, updates, and layers in each form.

    python benchmarks/gpu.py                     # all parts, some three minutes; appends to gpu.jsonl, then prints the tables
    python benchmarks/gpu.py --only REGEX        # those whose part, as in the file, matches
    python benchmarks/gpu.py --table             # only prints

Needs CUDA. Within a measurement all variants take turns, in random order each round, each for as many calls as take some milliseconds, and the GPU is waited for before and after. What counts is the ratio to the dense variant of the same round: the median over the rounds, and the quartiles.
Steps and evaluations have a dense twin that is compared with dense too: what differs from 1 there is the noise. Of equal rows the last counts."""
import argparse, json, random, re, time, warnings
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import median, quantiles
import torch
from torch import nn
from torch.nn import functional as F
from sparsefast.all import *
from sparsefast.ship.deploy import bsr_form, semi_structured_form, sparse_form, to_fastest
from sparsefast.storage import to_sparse_layers
from sparsefast.masks import masked_params
from sparsefast.patterns import block_pattern, nm_pattern
from sparsefast.storage.kernels import as_csr, index_of
import masking
from masking import markdown

out,cuda = Path(__file__).with_suffix('.jsonl'),torch.device('cuda')
works = {'MLP': (masking.mlp, 128, (784,)), 'ResNet-18': (lambda: masking.resnet(18), 128, (3, 64, 64)), 'ResNet-50': (lambda: masking.resnet(50), 64, (3, 224, 224)), 'transformer': (masking.Transformer, 64, (64, 384))}    # (model, batch, input)

def rounds(variants, n=15, seconds=.02):
    "name -> {ms, ratio to the first with quartiles}"
    def timed(f, k):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(k): f()
        torch.cuda.synchronize()
        return (time.perf_counter()-start)/k
    for f in variants.values():
        for _ in range(3): f()
    reps = {name: max(1, int(seconds/timed(f, 2))) for name,f in variants.items()}
    times,rng = {name: [] for name in variants}, random.Random(0)
    for i in range(n+1):
        for name in rng.sample(list(variants), len(variants)):
            t = timed(variants[name], reps[name])
            if i: times[name].append(t)                                      # the first round does not count
    first,res = times[next(iter(variants))],{}
    for name,ts in times.items():
        lo,mid,hi = quantiles([t/d for t,d in zip(ts, first)], n=4)
        res[name] = dict(ms=round(1000*median(ts), 4), ratio=round(mid, 4), low=round(lo, 4), high=round(hi, 4))
    return res

def made(name, sparse):
    torch.manual_seed(0)
    model = works[name][0]().to(cuda)
    if sparse: sparsify_model(model, .9)
    return model

# ------------------------------------------------------------ masked networks
def stepper(name, sparse, half):
    _,bs,shape = works[name]
    x,y = torch.randn(bs, *shape, device=cuda),torch.randint(10, (bs,), device=cuda)
    model,method = made(name, sparse),DSTMethod(**{**RigL_presets, 'batches_per_update': 10**6})
    opt,step = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=.9, weight_decay=1e-4),0
    def one():
        nonlocal step
        step += 1
        opt.zero_grad()
        with torch.autocast('cuda', torch.bfloat16, enabled=half): loss = F.cross_entropy(model(x), y)
        loss.backward()
        if sparse: method.step(model, opt, step, (step-1)/10**7)
        else: opt.step()
    return one

def steps():
    for name in works:
        for half in (False, True):
            yield dict(net=name, dtype='bfloat16 autocast' if half else 'float32', batch=works[name][1], forms=rounds({'dense': stepper(name, False, half), 'masked': stepper(name, True, half), 'dense again': stepper(name, False, half)}))

def evaluations():
    for name in works:
        for bs in (1, works[name][1]):
            x = torch.randn(bs, *works[name][2], device=cuda)
            def forward(model): return torch.no_grad()(partial(model.eval(), x))
            yield dict(net=name, dtype='float32', batch=bs, forms=rounds({'dense': forward(made(name, False)), 'masked': forward(made(name, True)), 'dense again': forward(made(name, False))}))

def updates():
    "Seconds, and memory on top (MiB)"
    for name in ('ResNet-50', 'transformer'):
        model = made(name, True)
        opt,ps = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9), [p for *_,p,_ in masked_params(model)]
        for p in model.parameters(): p.grad = torch.randn_like(p)
        opt.step()
        presets = {'RigL': RigL_presets, 'SET': SET_presets, 'SET, drawn on the GPU': {**SET_presets, 'grow_score_f': partial(random_score, on_device=True)}, 'SNFS': SNFS_presets}
        for preset,settings in presets.items():
            method,times,peaks = DSTMethod(**{**settings, 'batches_per_update': 100}),[],[]
            nnz = [int(mask.sum()) for *_,mask in masked_params(model)]
            for i in range(8):
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                had,start = torch.cuda.memory_allocated(),time.perf_counter()
                method.update(model, opt, 100*(i+1), 0.)
                torch.cuda.synchronize()
                if i: times.append(time.perf_counter()-start); peaks.append(torch.cuda.max_memory_allocated()-had)
            assert preset=='SNFS' or nnz==[int(mask.sum()) for *_,mask in masked_params(model)]
            lo,mid,hi = quantiles(times, n=4)
            yield dict(net=name, preset=preset, weights=sum(p.numel() for p in ps), tensors=len(ps), largest_mib=round(max(p.numel()*4 for p in ps)/2**20, 2), seconds=round(mid, 4), low=round(lo, 4), high=round(hi, 4), live_mib=round(max(peaks)/2**20, 1))

# ------------------------------------------------------------ single layers
def linear(o, i, dtype, sparsity, pattern_f=None):
    torch.manual_seed(0)
    layer = nn.Linear(i, o).to(cuda, dtype)
    sparsify_model(layer, sparsity, **(dict(pattern_f=pattern_f) if pattern_f else {}))
    return layer

def error(f, dense, x):
    want = dense(x).float()
    return float((f(x).float()-want).norm()/want.norm())

def graph(f):
    "The replay of `f` as a CUDA graph: what the GPU does, without what Python and PyTorch add to each call; `None` where that cannot be recorded"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            for _ in range(3): f()
        torch.cuda.current_stream().wait_stream(side)
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g):
            for _ in range(10): f()
    except RuntimeError: return None
    return g.replay

@torch.no_grad()
def layers():
    "Every form of a linear layer against dense, and `torch.sparse` CSR as one would write it: as calls, and ten of each as a CUDA graph"
    blocks = partial(block_pattern, size=(32, 32))
    for o,i in ((1024, 1024), (4096, 4096), (768, 3072)):
        for dtype,sparsity,pattern,make in ((torch.float32, .9, None, sparse_form), (torch.float32, .98, None, sparse_form), (torch.float16, .5, nm_pattern, semi_structured_form), (torch.float16, .9, blocks, bsr_form), (torch.float16, .95, blocks, bsr_form)):
            layer = linear(o, i, dtype, sparsity, pattern)
            dense,form = unsparsify_model(deepcopy(layer)),make(layer)
            csr = layer.weight.detach().to_sparse_csr() if dtype==torch.float32 else None
            for b in (1, 16, 128, 1024, 8192):
                x = torch.randn(b, i, device=cuda, dtype=dtype)
                fs = {'dense': partial(dense, x), make.__name__.removesuffix('_form'): partial(form, x)}
                if csr is not None: fs['csr'] = lambda: F.linear(x, csr, dense.bias)
                assert (err := error(form, dense, x))<(1e-4 if dtype==torch.float32 else 5e-3), (o, i, make, b, err)
                yield dict(shape=[o, i], dtype=str(dtype)[6:], sparsity=sparsity, batch=b, pattern={None: 'none', nm_pattern: '2:4', blocks: 'blocks of 32x32'}[pattern], forms=rounds(fs, 7, .005), graphs=rounds({n: g for n,f in fs.items() if (g := graph(f))}, 7, .005))

@torch.no_grad()
def ops():
    "The two products of compressed layers, for some numbers of columns"
    for o,i in ((1024, 1024), (4096, 4096)):
        layer = linear(o, i, torch.float32, .9)
        crow,col = index_of(layer.weight_mask)
        v = layer.weight[layer.weight_mask]
        for n in (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048):
            x = torch.randn(i, n, device=cuda)
            yield dict(shape=[o, i], columns=n, forms=rounds({'bag': lambda: torch.embedding_bag(x, col, crow, False, 0, False, v, True)[0], 'csr': lambda: as_csr(crow, col, v, i)@x}, 9, .01))

# ------------------------------------------------------------ training and whole models
def train():
    "Steps of an MLP in sparse storage, and masked, against dense; batch 128, Adam, without updates"
    for hidden in (1024, 4096):
        for sparsity in (.9, .98):
            def step(kind):
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)).to(cuda)
                if kind!='dense': sparsify_model(model, sparsity)
                if kind=='sparse': to_sparse_layers(model, least=.5)
                opt,n,method = torch.optim.Adam(model.parameters(), lr=1e-4),0,DSTMethod(**{**SET_presets, 'batches_per_update': 10**6})
                x,y = torch.randn(128, 784, device=cuda),torch.randint(10, (128,), device=cuda)
                def one():
                    nonlocal n
                    n += 1
                    opt.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    opt.step() if kind=='dense' else method.step(model, opt, n, (n-1)/10**7)
                return one
            yield dict(hidden=hidden, sparsity=sparsity, batch=128, forms=rounds({k: step(k) for k in ('dense', 'masked', 'sparse')}, 9))

def fastest():
    "What `to_fastest` chooses, and what the whole model gains"
    for name,dtype,sparsity,kw,batch in (('ResNet-50', torch.float32, .9, {}, 1), ('ResNet-50', torch.float32, .9, {}, 32), ('transformer', torch.float16, .5, dict(pattern_f=nm_pattern), 64), ('transformer', torch.float16, .9, dict(pattern_f=partial(block_pattern, size=(32, 32)), exclude='head'), 64)):
        torch.manual_seed(0)
        model = works[name][0]().to(cuda, dtype)
        if name=='transformer' and not kw.get('exclude'): kw = {**kw, 'exclude': 'head'}
        sparsify_model(model, sparsity, **kw)
        fast,table = to_fastest(model, torch.randn(batch, *works[name][2], device=cuda, dtype=dtype), seconds=.02)
        g,lo,hi = table.whole['gain']
        chosen = [r.form for r in table.rows]
        yield dict(net=name, dtype=str(dtype)[6:], sparsity=sparsity, pattern=getattr(getattr(kw.get('pattern_f'), 'func', kw.get('pattern_f')), '__name__', 'none'), batch=batch, chosen={f: chosen.count(f) for f in sorted(set(chosen))}, gain=round(g, 4), low=round(lo, 4), high=round(hi, 4), dense_ms=round(table.whole['dense'], 4))

parts = dict(steps=steps, evaluations=evaluations, updates=updates, layers=layers, ops=ops, train=train, fastest=fastest)

# ------------------------------------------------------------ all of it
def key(r): return tuple((k, str(v)) for k,v in r.items() if k in ('part', 'net', 'preset', 'dtype', 'batch', 'shape', 'sparsity', 'pattern', 'columns', 'hidden'))

def rows(part):
    "The latest rows of a part"
    found = {}
    for r in map(json.loads, out.read_text().splitlines()) if out.exists() else []:
        if r['part']==part: found[key(r)] = r
    return list(found.values())

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--only', default='', help='parts that match this regular expression')
    ap.add_argument('--table', action='store_true', help='only print the tables')
    args = ap.parse_args()
    warnings.simplefilter('ignore')
    for part,f in [] if args.table else parts.items():
        if not re.search(args.only, part): continue
        for r in f():
            r = dict(part=part, **r, device=torch.cuda.get_device_name(), torch=torch.__version__)
            with out.open('a') as o: o.write(json.dumps(r)+'\n')
        print(part, flush=True)
    print(*(t() for t in (step_table, eval_table, update_table, layer_table, partial(layer_table, 'graphs'), train_table, fastest_table)), setting(), sep='\n\n')

# ------------------------------------------------------------ what it came to
def show(f): return f"{f['ratio']:.3f} ({f['low']:.3f}-{f['high']:.3f})"
def gain(f): return f"{1/f['ratio']:.2f} ({1/f['high']:.2f}-{1/f['low']:.2f})"

def step_table():
    "Training steps: masked to dense, and dense to dense"
    return markdown(['network', 'batch', 'arithmetic', 'dense step', 'masked / dense', 'dense / dense'], [[r['net'], str(r['batch']), r['dtype'], f"{r['forms']['dense']['ms']:.2f} ms", show(r['forms']['masked']), show(r['forms']['dense again'])] for r in rows('steps')])

def eval_table():
    "Forward passes in evaluation"
    return markdown(['network', 'batch', 'dense', 'masked / dense', 'dense / dense'], [[r['net'], str(r['batch']), f"{r['forms']['dense']['ms']:.2f} ms", show(r['forms']['masked']), show(r['forms']['dense again'])] for r in rows('evaluations')])

def update_table():
    "One update: time, and memory on top"
    return markdown(['network', 'method', 'weights', 'one update', 'memory on top', 'largest layer'], [[r['net'], r['preset'], f"{r['weights']/1e6:.1f} million", f"{1000*r['seconds']:.1f} ms ({1000*r['low']:.1f}-{1000*r['high']:.1f})", f"{r['live_mib']:.1f} MiB", f"{r['largest_mib']:.1f} MiB"] for r in rows('updates')])

def layer_table(how='forms'):
    "How many times as fast as dense one linear layer is, by batch: 'forms' as calls, 'graphs' as CUDA graphs"
    by = {}
    for r in rows('layers'):
        for f in r[how]:
            if f!='dense': by.setdefault((f"{r['shape'][0]}x{r['shape'][1]}", r['dtype'], f"{100*r['sparsity']:.0f} %", f), {})[r['batch']] = r[how][f]
    sizes = sorted({b for v in by.values() for b in v})
    return markdown(['layer', 'dtype', 'sparsity', 'form', *(f'batch {b}' for b in sizes)], [[*k, *(f"{1/v[b]['ratio']:.2f}" if b in v else '' for b in sizes)] for k,v in by.items()])

def spread(how='forms'):
    "How far the quartiles of that table are from their medians"
    off = sorted(max(f['high']/f['ratio'], f['ratio']/f['low'])-1 for r in rows('layers') for n,f in r[how].items() if n!='dense')
    return f"from median to quartiles: {off[len(off)//2]:.0%} in half of the cells, {off[9*len(off)//10]:.0%} in nine of ten, {off[-1]:.0%} at most"

def train_table():
    "Training steps of an MLP: how many times as fast as dense"
    return markdown(['hidden', 'sparsity', 'dense step', 'masked', 'sparse layers'], [[str(r['hidden']), f"{100*r['sparsity']:.0f} %", f"{r['forms']['dense']['ms']:.2f} ms", gain(r['forms']['masked']), gain(r['forms']['sparse'])] for r in rows('train')])

def fastest_table():
    "What `to_fastest` makes of whole models"
    return markdown(['network', 'dtype', 'sparsity', 'pattern', 'batch', 'layers chosen', 'gain'], [[r['net'], r['dtype'], f"{100*r['sparsity']:.0f} %", r['pattern'], str(r['batch']), ', '.join(f'{n} {f}' for f,n in r['chosen'].items()), f"{r['gain']:.2f} ({r['low']:.2f}-{r['high']:.2f})"] for r in rows('fastest')])

def setting():
    "Where all this was measured"
    seen = sorted({f"{r['device']}, torch {r['torch']}" for part in parts for r in rows(part)})
    return f"Measured on one {' and '.join(seen)}; weights and masks by seed 0."

if __name__=='__main__': main()
