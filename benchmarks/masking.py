"""What a mask costs: training steps, evaluations, updates and memory, sparse (90 %) against dense.

    python benchmarks/masking.py                     # runs what masking.jsonl lacks, then prints the tables
    python benchmarks/masking.py --only REGEX        # those whose name, as printed, matches
    python benchmarks/masking.py --again             # measures also what is there already; of equal names the last counts
    python benchmarks/masking.py --table             # only prints

Each measurement is one process's work of at most two minutes: the variants take turns, in random order each round, and what counts is the ratio of a sparse step to the dense step of its own round: the median over the rounds, with the
quartiles. Each has a dense twin that is compared with dense too: what differs from 1 there is the noise. Where that is large (a quartile further than 5 % from 1), the measurement is made again, three times at most, and the last is what counts, whatever it says. Everything is on as a user has it: hooks, and the engine (plain loop) or the callback (fastai's loop). The steps are those without an update."""
import argparse, ctypes, json, os, platform, random, re, subprocess, sys, time, warnings
from pathlib import Path
from statistics import median, quantiles
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from fastai.basics import DataLoaders, Learner, SGD
from fastai.callback.progress import ProgressCallback
from fastcore.basics import noop
from sparsefast.all import *
from sparsefast.masks import masked_params, places, widened, zero_masked_

out = Path(__file__).with_suffix('.jsonl')
sparsity = 0.9

# ------------------------------------------------------------ the three workloads
class Transformer(nn.Module):
    "Six layers of width 384"
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0., batch_first=True)
        self.body,self.head = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), nn.Linear(384, 10)
    def forward(self, x): return self.head(self.body(x).mean(1))

def mlp(): return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))

def resnet(depth):
    from torchvision import models
    return getattr(models, f'resnet{depth}')(num_classes=10 if depth==18 else 1000)

works = {'MLP': (mlp, 128, (784,), 80), 'ResNet-18': (lambda: resnet(18), 16, (3, 64, 64), 24), 'transformer': (Transformer, 16, (64, 384), 10)}    # (model, batch, input, rounds)

def made(name, sparse):
    torch.manual_seed(0)
    model = works[name][0]()
    if sparse: sparsify_model(model, sparsity)
    return model

def rounds(variants, n, warm=3):
    "Seconds of each variant, a function, in `n` rounds of random order"
    for _ in range(warm):
        for f in variants.values(): f()
    times,order,rng = {k: [] for k in variants}, list(variants), random.Random(0)
    for _ in range(n):
        rng.shuffle(order)
        for k in order:
            start = time.perf_counter()
            variants[k]()
            times[k].append(time.perf_counter()-start)
    return times

def ratios(times, base='dense'):
    "Of each variant to the base: median and quartiles over the rounds"
    res = {}
    for k,t in times.items():
        if k==base: continue
        r = [a/b for a,b in zip(t, times[base])]
        q = quantiles(r, n=4)
        res[k] = dict(ratio=round(median(r), 4), low=round(q[0], 4), high=round(q[2], 4), ms=round(1000*median(t), 3))
    return dict(ms=round(1000*median(times[base]), 3), rounds=len(times[base]), variants=res)

# ------------------------------------------------------------ a training step
def plain_steps(name, optim):
    "A step of a loop of one's own"
    _,bs,shape,n = works[name]
    x,y = torch.randn(bs, *shape), torch.randint(10, (bs,))
    def stepper(sparse):
        model,method = made(name, sparse), DSTMethod(**{**RigL_presets, 'batches_per_update': 10**6}) if sparse else None
        opt = optims[optim](model.parameters())
        step = 0
        def one():
            nonlocal step
            step += 1
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if method: method.step(model, opt, step, (step-1)/10**7)
            else: opt.step()
        return one
    return ratios(rounds({'dense': stepper(False), 'sparse': stepper(True), 'dense again': stepper(False)}, n))

optims = dict(SGD=lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9, weight_decay=1e-4), AdamW=lambda ps: torch.optim.AdamW(ps, lr=1e-4), fused=lambda ps: torch.optim.AdamW(ps, lr=1e-4, fused=True))


def fastai_steps(name, optim):
    "Fits of some batches by fastai's loop, whose time is divided by their number: what happens once a fit is shared among them"
    _,bs,shape,n = works[name]
    b,k = (torch.randn(bs, *shape), torch.randint(10, (bs,))), {'MLP': 50, 'ResNet-18': 20, 'transformer': 8}[name]
    def stepper(sparse):
        cbs = [DynamicSparseTrainingCallback(**{**RigL_presets, 'batches_per_update': 10**6})] if sparse else []
        learn = Learner(DataLoaders(dl(b, k), dl(b, 1)), made(name, sparse), loss_func=nn.CrossEntropyLoss(), lr=1e-3, opt_func=SGD, cbs=cbs)
        learn.logger = noop
        learn.remove_cb(ProgressCallback)
        def some():
            with learn.no_bar(): learn.fit(1)
        return some
    res = ratios(rounds({'dense': stepper(False), 'sparse': stepper(True), 'dense again': stepper(False)}, {'MLP': 24, 'ResNet-18': 8, 'transformer': 5}[name], warm=1))
    return {**res, 'batches': k}

def dl(b, n):
    from fastai.data.load import DataLoader
    class Same(torch.utils.data.Dataset):
        def __len__(self): return n*len(b[0])
        def __getitem__(self, i): return b[0][i%len(b[0])], b[1][i%len(b[0])]
    return DataLoader(Same(), bs=len(b[0]), num_workers=0, create_batches=lambda idxs: [b for _ in range(n)], device='cpu')

# ------------------------------------------------------------ the pass over the gradients
def passes(name):
    "Nanoseconds a weight, just after a backward pass: gradients masked by the mask itself, by a wide mask as the engine does, and multiplied by a number (what reading and writing them takes)"
    _,bs,shape,n = works[name]
    model,x,y = made(name, True), torch.randn(bs, *shape), torch.randint(10, (bs,))
    found = [(p, mask, widened(mask, p)) for *_,p,mask in masked_params(model)]
    ways = dict(pieces=lambda p, mask, wide: zero_masked_(p.grad, mask), wide=lambda p, mask, wide: zero_masked_(p.grad, mask, wide), floor=lambda p, mask, wide: p.grad.mul_(1.))
    ns,rng = {k: [] for k in ways}, random.Random(0)
    for _ in range(n//2+2):
        for k in rng.sample(list(ways), len(ways)):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            start = time.perf_counter()
            for f in found: ways[k](*f)
            ns[k].append(1e9*(time.perf_counter()-start)/sum(p.numel() for p,*_ in found))
    return dict(weights=sum(p.numel() for p,*_ in found), rounds=n//2, ways={k: dict(zip(('low', 'ns', 'high'), (round(q, 4) for q in quantiles(t[2:], n=4)))) for k,t in ns.items()})

# ------------------------------------------------------------ an evaluation
def evaluations(name, bs):
    "A forward pass without gradients, hooks enforced; by hooks that mask each time; and by hooks that do nothing at all. All have the same weights in the same memory, so that it is hooks that differ"
    _,_,shape,n = works[name]
    x = torch.randn(bs, *shape)
    def forward(model):
        model.eval()
        def one():
            with torch.no_grad(): model(x)
        return one
    models = {'dense': made(name, False), 'sparse': made(name, True), 'always masking': hooked(name, apply_masks), 'empty hooks': hooked(name, lambda *_: None), 'dense again': made(name, False)}
    weights = dict(models['sparse'].named_parameters())
    for m in models.values(): m.load_state_dict({**m.state_dict(), **weights}, assign=True)
    many = 20 if bs==1 and name=='MLP' else 3
    return ratios(rounds({k: times(forward(m), many) for k,m in models.items()}, 100 if bs==1 else n))

def hooked(name, f):
    "A sparse network with hooks of another kind"
    model = made(name, True)
    for m in model.modules(): m._forward_pre_hooks.clear()
    for m in dict.fromkeys(m for m,*_ in masked_params(model)): m.register_forward_pre_hook(f)
    return model

def times(f, n):
    def many():
        for _ in range(n): f()
    return many

# ------------------------------------------------------------ an update
def status(what): return int(re.search(what+r':\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024

def updates(layers):
    "Seconds of an update by RigL, what the process's memory rises by meanwhile, and what of that is in use at once (MiB): the rise of a process whose freed memory goes back at once"
    child = f'import masking, torch; torch.set_num_threads({torch.get_num_threads()}); print(max(masking.some_updates({layers}, 3)[3]))'
    live = float(subprocess.run([sys.executable, '-W', 'ignore', '-c', child], env={**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}, cwd=out.parent, capture_output=True, text=True, check=True).stdout)
    n = 9 if layers is None else 5
    tensors,largest,seconds,peaks = some_updates(layers, n)
    q = quantiles(seconds, n=4)
    return dict(tensors=len(tensors), weights=sum(tensors), largest_mib=round(largest, 2), seconds=round(median(seconds), 4), low=round(q[0], 4), high=round(q[2], 4), rounds=n, peak_mib=round(max(peaks), 1), live_mib=round(live, 1))

def some_updates(layers, n):
    "Sizes of the tensors, MiB of the largest, and for each of `n` updates the seconds and the rise of the process's memory"
    torch.manual_seed(0)
    model = resnet(50) if layers is None else nn.Linear(layers//1000, 1000, bias=False)
    sparsify_model(model, sparsity)
    method,opt = DSTMethod(**{**RigL_presets, 'batches_per_update': 100}), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for p in model.parameters(): p.grad = torch.randn_like(p)
    opt.step()
    seconds,peaks = [], []
    small = nn.Linear(512, 512)
    sparsify_model(small, sparsity)
    small.weight.grad = torch.randn_like(small.weight)
    method.update(small, torch.optim.SGD(small.parameters(), lr=0.1), 100, 0.)              # loads the code that an update needs
    for i in range(n):
        for p in model.parameters(): p.grad.normal_()
        nnz = [int(mask.count_nonzero()) for _,mask,_ in sparse_params(model)]
        ctypes.CDLL(None).malloc_trim(0)                                                   # freed memory that is still resident would hide a rise
        Path('/proc/self/clear_refs').write_text('5')
        rss,start = status('VmRSS'), time.perf_counter()
        method.update(model, opt, 100*(i+1), 0.)
        seconds.append(time.perf_counter()-start)
        peaks.append(status('VmHWM')-rss)
        assert nnz==[int(mask.count_nonzero()) for _,mask,_ in sparse_params(model)]
    sizes = [p.numel() for p,*_ in sparse_params(model)]
    return sizes, max(sizes)*4/2**20, seconds, peaks

# ------------------------------------------------------------ square roots
def roots(n=1<<20, k=40):
    "Nanoseconds that torch's `sqrt` takes for a positive number, for a zero, and where nine in ten are zeros: median and quartiles"
    positive = torch.rand(n)+.1
    given = dict(positive=positive, zeros=torch.zeros(n), ninety=positive*(torch.rand(n)>.9))
    got = rounds({name: x.sqrt for name,x in given.items()}, k)
    return {name: [round(1e9*q/n, 3) for q in quantiles(ts, n=4)] for name,ts in got.items()}

# ------------------------------------------------------------ what an update is made of
def primitives(n=1<<20, k=30):
    "Nanoseconds a number, of a vector of which a tenth is chosen: what torch has for it, and what stands in its place (median and quartiles)"
    t,where = torch.randn(n), torch.rand(n)<.1
    idx,cut,out = places(where), torch.tensor(1.), torch.zeros(n)
    some = t.index_select(0, idx)
    fs = {'compare': (lambda: t>cut, lambda: np.greater(t.numpy(), cut.numpy())), 'count': (where.count_nonzero, lambda: np.count_nonzero(where.numpy())),
          'find': (where.nonzero, lambda: np.flatnonzero(where.numpy())), 'gather': (lambda: t[idx], lambda: t.index_select(0, idx)),
          'scatter': (lambda: out.index_put_((idx,), some), lambda: out.scatter_(0, idx, some))}
    got = rounds({(name, i): f for name,both in fs.items() for i,f in enumerate(both)}, k)
    return {name: [[round(1e9*q/n, 4) for q in quantiles(got[name, i], n=4)] for i in (0, 1)] for name in fs}

# ------------------------------------------------------------ memory
def memory(name):
    "Bytes a weight that stay resident beside the weights while a training runs: in buffers, and in what is noted at their memory, with wide masks and without"
    res = {}
    for wide in (True, False):
        model = made(name, True)
        opt,method = optims['SGD'](model.parameters()), DSTMethod(**{**RigL_presets, 'batches_per_update': 10**6, 'wide_masks': wide})
        _,bs,shape,_ = works[name]
        for step in (1, 2):
            F.cross_entropy(model(torch.randn(bs, *shape)), torch.randint(10, (bs,))).backward()
            method.step(model, opt, step, 0.)
        found = list(masked_params(model))
        n = sum(p.numel() for *_,p,_ in found)
        noted = sum(v.numel()*v.element_size() for *_,p,_ in found for facts in vars(p.untyped_storage())['masked'].values() for v in facts.values() if torch.is_tensor(v))
        buffers = sum(b.numel()*b.element_size() for m,name_,*_ in found for k,b in m._buffers.items() if b is not None and k.startswith(f'{name_}_'))
        res |= {'buffers': round(buffers/n, 4), 'noted' if wide else 'lean': round(noted/n, 4)}
    return dict(weights=n, **res)

# ------------------------------------------------------------ all of it
def plan():
    "All measurements: (name, threads, function, arguments)"
    yield 'update ResNet-50', 1, updates, (None,)
    for threads in (1, 2):
        for name in works:
            yield f'plain SGD {name}', threads, plain_steps, (name, 'SGD')
            yield f'fastai SGD {name}', threads, fastai_steps, (name, 'SGD')
            yield f'eval {name} batch {works[name][1]}', threads, evaluations, (name, works[name][1])
            yield f'eval {name} batch 1', threads, evaluations, (name, 1)
    yield 'update ResNet-50', 2, updates, (None,)
    for name in works: yield f'plain AdamW {name}', 1, plain_steps, (name, 'AdamW')
    for name in works: yield f'plain AdamW, fused {name}', 1, plain_steps, (name, 'fused')
    yield 'square roots', 1, roots, ()
    yield 'primitives', 1, primitives, ()
    for n in (1, 10, 100): yield f'update {n}M', 1, updates, (n*10**6,)
    for name in works:
        for threads in (1, 2): yield f'pass {name}', threads, passes, (name,)
        yield f'memory {name}', 1, memory, (name,)

def quiet(res):
    "Were two dense networks within 5 % of each other in half of the rounds? Where nothing dense was measured twice, nobody knows"
    twin = res.get('variants', {}).get('dense again')
    return not twin or twin['low']>0.95 and twin['high']<1.05

def hardware():
    cpu = next((l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name')), platform.processor())
    return dict(cpu=cpu, torch=torch.__version__, python=platform.python_version())

def done(): return {(r['name'], r['threads']): r for r in map(json.loads, out.read_text().splitlines())} if out.exists() else {}

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--only', default='', help='measurements whose name and threads match this regular expression')
    ap.add_argument('--again', action='store_true', help='measure what is there already, too')
    ap.add_argument('--table', action='store_true', help='only print the tables')
    ap.add_argument('--seconds', type=float, default=float('inf'), help='begin no measurement after so many seconds')
    args,start = ap.parse_args(), time.perf_counter()
    warnings.simplefilter('ignore')
    for name,threads,f,arg in [] if args.table else plan():
        if not re.search(args.only, f'{name} {threads}') or (name,threads) in done() and not args.again or time.perf_counter()-start>args.seconds: continue
        torch.set_num_threads(threads)
        for tries in (1, 2, 3):
            res = f(*arg)
            if quiet(res): break
        rec = dict(name=name, threads=threads, **res, tries=tries, **hardware())
        with out.open('a') as o: o.write(json.dumps(rec)+'\n')
        print(rec, flush=True)
    print(step_table(), pass_table(), eval_table(), update_table(), memory_table(), setting(), sep='\n\n')

# ------------------------------------------------------------ what it came to
def markdown(head, rows):
    "Columns of numbers are set to the right"
    to_right = [all(not r[i] or r[i][0].isdigit() for r in rows) for i in range(len(head))]
    return '\n'.join('| '+' | '.join(r)+' |' for r in [head, ['---:' if t else '---' for t in to_right], *rows])

def show(r, k):
    "A ratio, with its quartiles"
    v = r and r['variants'].get(k)
    return f"{v['ratio']:.3f} ({v['low']:.3f}-{v['high']:.3f})" if v else ''

def step_table():
    "Training steps: sparse to dense, and dense to dense"
    got = done()
    rows = [[name, kind, str(t), f"{r['ms']/r.get('batches', 1):.1f} ms", show(r, 'sparse'), show(r, 'dense again')] for name in works for kind in ('plain SGD', 'plain AdamW', 'plain AdamW, fused', 'fastai SGD') for t in (1, 2) if (r := got.get((f'{kind} {name}', t)))]
    return markdown(['network', 'loop', 'threads', 'dense step', 'sparse / dense', 'dense / dense'], rows)

def pass_table():
    "The pass over the gradients"
    rows = [[name, f"{r['weights']/1e6:.1f} million", str(t), *(f"{w['ns']:.2f} ({w['low']:.2f}-{w['high']:.2f})" for w in r['ways'].values())] for name in works for t in (1, 2) if (r := done().get((f'pass {name}', t)))]
    return markdown(['network', 'weights', 'threads', 'by the mask: ns a weight', 'by a wide mask', 'times a number'], rows)

def eval_table():
    "Evaluations: sparse to dense, with hooks that mask each time to dense, with hooks that do nothing to dense, and dense to dense"
    got = done()
    rows = [[name, str(bs), str(t), show(r, 'sparse'), show(r, 'always masking'), show(r, 'empty hooks'), show(r, 'dense again')] for name in works for bs in (works[name][1], 1) for t in (1, 2) if (r := got.get((f'eval {name} batch {bs}', t)))]
    return markdown(['network', 'batch', 'threads', 'sparse / dense', 'always masking / dense', 'empty hooks / dense', 'dense / dense'], rows)

def update_table():
    "Updates: seconds and memory"
    got = done()
    rows = [[name, str(r['tensors']), f"{r['weights']/1e6:.1f} million", str(t), f"{r['seconds']:.3f} s ({r['low']:.3f}-{r['high']:.3f})", f"{1e9*r['seconds']/r['weights']:.1f} ns", f"{r['live_mib']:.1f} MiB" if 'live_mib' in r else '', f"{r['peak_mib']:.1f} MiB", f"{r['largest_mib']:.1f} MiB"]
            for name in ('ResNet-50', '1M', '10M', '100M') for t in (1, 2) if (r := got.get((f'update {name}', t)))]
    return markdown(['network', 'tensors', 'weights', 'threads', 'one update', 'a weight', 'memory in use on top', 'with what was freed', 'largest layer'], rows)

def primitive_table():
    "What torch has, and what is used"
    r = done()['primitives', 1]
    by = dict(compare='`>`; numpy', count='`count_nonzero`; numpy', find='`nonzero`; numpy', gather='`t[idx]`; `index_select`', scatter='`t[idx] = x`; `scatter_`')
    return markdown(['', 'torch has; is used', 'torch: ns a number', 'used: ns a number'], [[k, by[k], *(f"{mid:.2f} ({lo:.2f}-{hi:.2f})" for lo,mid,hi in r[k])] for k in by])

def memory_table():
    "What stays resident"
    rows = [[name, f"{r['weights']/1e6:.1f} million", f"{r['buffers']:.3f}", f"{r['noted']:.3f}", f"{r['lean']:.3f}"] for name in works if (r := done().get((f'memory {name}', 1)))]
    return markdown(['network', 'weights', 'buffers, bytes a weight', 'notes, bytes a weight', 'notes, with `wide_masks=False`'], rows)

def setting():
    "Where all this was measured"
    seen = sorted({f"{r['cpu']}, torch {r['torch']}, Python {r['python']}" for r in done().values()})
    return 'Measured on '+' and '.join(seen)+'.'

if __name__=='__main__': main()
