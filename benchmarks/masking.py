"""The cost of masking: training steps, evaluations, updates and memory of sparse networks (90 %) against dense ones.

    python benchmarks/masking.py                     # run what masking.jsonl lacks, then print the tables
    python benchmarks/masking.py --only REGEX        # only measurements whose name and threads match
    python benchmarks/masking.py --again             # also repeat what is there; of rows with one name the last counts
    python benchmarks/masking.py --table             # print the tables only

Each measurement takes at most two minutes. The variants take turns, in a new random order each round. A result is the ratio of a variant's time to the dense time of the same round: the median over the rounds, with
the quartiles. Every measurement of ratios has a second dense network, whose ratio to the first shows the noise. If one of its quartiles is further than 5 % from 1, the measurement is repeated, up to three times,
and the last one counts.

With one thread, times are CPU times of the process: nothing here waits for a disk or sleeps, so on an idle machine that is what a clock on the wall shows, and on a busy one other processes disturb it less.
With two threads, times are wall-clock times.

Everything is on as a user has it: the guards, and the engine in a plain loop or the callback in fastai's. Training steps are those without an update."""
import ctypes, gc, os, random, re, subprocess, sys, time, warnings
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from unittest.mock import patch
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from fastai.basics import DataLoaders, Learner, SGD
from fastai.callback.progress import ProgressCallback
from fastcore.basics import noop
from sparsefast import methods, ops
from sparsefast.all import *
from sparsefast.topk import _kth
from sparsefast.guard import MaskGuard, guard_places, remove_guards
from sparsefast.masks import masked_params, nonzero_flat, zero_masked_all_
from records import Records, hardware, parser

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

# name: (model, batch, shape of an input, rounds)
works = {'MLP': (mlp, 128, (784,), 80), 'ResNet-18': (lambda: resnet(18), 16, (3, 64, 64), 24), 'transformer': (Transformer, 16, (64, 384), 10)}

def now():
    "Read the clock: CPU time of this process with one thread, which other processes disturb little; wall-clock time with more"
    return time.process_time() if torch.get_num_threads()==1 else time.perf_counter()

def made(name, sparse):
    "Make a network, always from the same seed"
    torch.manual_seed(0)
    model = works[name][0]()
    if sparse: sparsify_model(model, sparsity)
    return model

def rounds(variants, n, warm=3):
    "Time each variant, a function, in `n` rounds of random order: seconds"
    for _ in range(warm):
        for f in variants.values(): f()
    times,order,rng = {k: [] for k in variants}, list(variants), random.Random(0)
    for _ in range(n):
        rng.shuffle(order)
        for k in order:
            start = now()
            variants[k]()
            times[k].append(now()-start)
    return times

def ratios(times, base='dense'):
    "Compute the ratio of each variant to the base: median and quartiles over the rounds"
    res = {}
    for k,t in times.items():
        if k==base: continue
        r = [a/b for a,b in zip(t, times[base])]
        q = quantiles(r, n=4)
        res[k] = dict(ratio=round(median(r), 4), low=round(q[0], 4), high=round(q[2], 4), ms=round(1000*median(t), 3))
    return dict(ms=round(1000*median(times[base]), 3), rounds=len(times[base]), variants=res)

# ------------------------------------------------------------ a training step
optims = dict(SGD=lambda ps: torch.optim.SGD(ps, lr=1e-3, momentum=0.9, weight_decay=1e-4), AdamW=lambda ps: torch.optim.AdamW(ps, lr=1e-4), fused=lambda ps: torch.optim.AdamW(ps, lr=1e-4, fused=True))

def still():
    "Make a method whose first update never comes"
    return DSTMethod(**{**RigL_presets, 'batches_per_update': 10**6})

def plain_steps(name, optim):
    "Time a step of a plain PyTorch loop"
    _,bs,shape,n = works[name]
    x,y = torch.randn(bs, *shape), torch.randint(10, (bs,))
    def stepper(sparse):
        model,method = made(name, sparse),still() if sparse else None
        opt = optims[optim](model.parameters())
        step = 0
        def one():
            nonlocal step
            step += 1
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if method: method.step(model, opt, step, total=10**7)
            else: opt.step()
        return one
    return ratios(rounds({'dense': stepper(False), 'sparse': stepper(True), 'dense again': stepper(False)}, n))

def fastai_steps(name, optim):
    "Time short fits by fastai's loop; what happens once a fit is shared by its batches"
    _,bs,shape,n = works[name]
    b,k = (torch.randn(bs, *shape), torch.randint(10, (bs,))), {'MLP': 50, 'ResNet-18': 20, 'transformer': 8}[name]
    def stepper(sparse):
        cbs = [DynamicSparseTrainingCallback(still())] if sparse else []
        learn = Learner(DataLoaders(dl(b, k), dl(b, 1)), made(name, sparse), loss_func=nn.CrossEntropyLoss(), lr=1e-3, opt_func=SGD, cbs=cbs)
        learn.logger = noop
        learn.remove_cb(ProgressCallback)
        def some():
            with learn.no_bar(): learn.fit(1)
        return some
    res = ratios(rounds({'dense': stepper(False), 'sparse': stepper(True), 'dense again': stepper(False)}, {'MLP': 24, 'ResNet-18': 8, 'transformer': 5}[name], warm=1))
    return {**res, 'batches': k}

def dl(b, n):
    "Make a loader that gives the same batch `n` times"
    from fastai.data.load import DataLoader
    class Same(torch.utils.data.Dataset):
        def __len__(self): return n*len(b[0])
        def __getitem__(self, i): return b[0][i%len(b[0])], b[1][i%len(b[0])]
    return DataLoader(Same(), bs=len(b[0]), num_workers=0, create_batches=lambda idxs: [b for _ in range(n)], device='cpu')

# ------------------------------------------------------------ the parts of a masked step
def parts(name):
    "Time the parts of a masked step, in microseconds: both passes, the guards, and the engine's other work"
    _,bs,shape,n = works[name]
    model,x,y = made(name, True), torch.randn(bs, *shape), torch.randint(10, (bs,))
    opt,method,spent,steps = optims['SGD'](model.parameters()), still(), {}, []
    def timed(k, f):
        def g(*args, **kwargs):
            start = now()
            try: return f(*args, **kwargs)
            finally: spent[k] = spent.get(k, 0)+1e6*(now()-start)
        return g
    watched = dict(gradients=(methods, 'mask_gradients_'), weights=(methods, 'mask_weights_'), guards=(MaskGuard, '__call__'), before=(DSTMethod, '_before'), after=(DSTMethod, '_after'))
    with ExitStack() as stack:
        for k,(owner,attr) in watched.items(): stack.enter_context(patch.object(owner, attr, timed(k, getattr(owner, attr))))
        for step in range(1, 2*n+4):
            spent.clear()
            opt.zero_grad()
            start = now()
            F.cross_entropy(model(x), y).backward()
            method.step(model, opt, step, total=10**7)
            spent['step'] = 1e6*(now()-start)
            spent['engine'] = spent['before']+spent['after']-spent['gradients']-spent['weights']
            steps.append(dict(spent))
    return dict(rounds=2*n, us={k: round(median(s[k] for s in steps[3:]), 1) for k in ('step', 'gradients', 'weights', 'guards', 'engine')})

# ------------------------------------------------------------ a pass over the gradients
def passes(name):
    "Time a pass over all gradients just after a backward pass, in ns a weight: masking with and without the compiled loop, and multiplying by a number, which shows what reading and writing takes"
    _,bs,shape,n = works[name]
    model,x,y = made(name, True), torch.randn(bs, *shape), torch.randint(10, (bs,))
    ps,masks = zip(*((p, mask) for *_,p,mask in masked_params(model)))
    def uncompiled(grads):
        with patch.object(ops, '_kernels', None): zero_masked_all_(grads, masks)
    ways = dict(masked=lambda grads: zero_masked_all_(grads, masks), uncompiled=uncompiled, floor=lambda grads: [g.mul_(1.) for g in grads])
    total,ns,rng = sum(p.numel() for p in ps), {k: [] for k in ways}, random.Random(0)
    for _ in range(n+2):
        for k in rng.sample(list(ways), len(ways)):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            grads,start = [p.grad for p in ps],now()
            ways[k](grads)
            ns[k].append(1e9*(now()-start)/total)
    return dict(weights=total, rounds=n, ways={k: dict(zip(('low', 'ns', 'high'), (round(q, 4) for q in quantiles(t[2:], n=4)))) for k,t in ns.items()})

# ------------------------------------------------------------ an evaluation
def evaluations(name, bs):
    "Time a forward pass without gradients: with guards, with a hook that masks every time, and with empty hooks where guards are; all networks share one set of weights, so only the hooks differ"
    _,_,shape,n = works[name]
    x = torch.randn(bs, *shape)
    def forward(model):
        model.eval()
        def one():
            with torch.no_grad(): model(x)
        return one
    models = {'dense': made(name, False), 'sparse': made(name, True), 'always masking': hooked(name, apply_masks, top=True), 'empty hooks': hooked(name, lambda *_: None), 'dense again': made(name, False)}
    weights = dict(models['sparse'].named_parameters())
    for m in models.values(): m.load_state_dict({**m.state_dict(), **weights}, assign=True)
    many = 20 if bs==1 and name=='MLP' else 3
    return ratios(rounds({k: times(forward(m), many) for k,m in models.items()}, 100 if bs==1 else n))

def hooked(name, f, top=False):
    "Make a sparse network with another hook in the place of each guard, or on the model alone"
    model = made(name, True)
    places = [m for m,_ in guard_places(model)]
    remove_guards(model)
    for m in [model] if top else places: m.register_forward_pre_hook(f)
    return model

def times(f, n):
    def many():
        for _ in range(n): f()
    return many

# ------------------------------------------------------------ an update
def status(what):
    "Read a size of this process, in MiB"
    return int(re.search(what+r':\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024

def updates(layers):
    "Time an update by RigL, and measure what memory rises by meanwhile, in MiB: what is in use at once, from a process that gives freed memory back at once, and with what was freed"
    child = f'import masking, torch; torch.set_num_threads({torch.get_num_threads()}); print(max(masking.some_updates({layers}, 3)[3]))'
    live = float(subprocess.run([sys.executable, '-W', 'ignore', '-c', child], env={**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}, cwd=records.path.parent, capture_output=True, text=True, check=True).stdout)
    n = 9 if layers is None else 5
    tensors,largest,seconds,peaks = some_updates(layers, n)
    q = quantiles(seconds, n=4)
    return dict(tensors=len(tensors), weights=sum(tensors), largest_mib=round(largest, 2), seconds=round(median(seconds), 4), low=round(q[0], 4), high=round(q[2], 4), rounds=n, peak_mib=round(max(peaks), 1), live_mib=round(live, 1))

def some_updates(layers, n):
    "Make `n` updates: sizes of the tensors, MiB of the largest, and for each update its seconds and the rise of memory"
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
        rss,start = status('VmRSS'), now()
        method.update(model, opt, 100*(i+1), 0.)
        seconds.append(now()-start)
        peaks.append(status('VmHWM')-rss)
        assert nnz==[int(mask.count_nonzero()) for _,mask,_ in sparse_params(model)]
    sizes = [p.numel() for p,*_ in sparse_params(model)]
    return sizes, max(sizes)*4/2**20, seconds, peaks

# ------------------------------------------------------------ square roots
def roots(n=1<<20, k=40):
    "Time torch's `sqrt` of positive numbers, of zeros, and of a vector with nine zeros in ten, in ns a number: quartiles"
    positive = torch.rand(n)+.1
    given = dict(positive=positive, zeros=torch.zeros(n), ninety=positive*(torch.rand(n)>.9))
    got = rounds({name: x.sqrt for name,x in given.items()}, k)
    return {name: [round(1e9*q/n, 3) for q in quantiles(ts, n=4)] for name,ts in got.items()}

# ------------------------------------------------------------ what an update is made of
def primitives(n=1<<20, k=30):
    "Time what torch has for the work of an update, and what the engine uses in its place, on a vector of which a tenth is chosen, in ns a number: quartiles"
    t,where,cut = torch.randn(n), torch.rand(n)<.1, torch.tensor(1.)
    idx = nonzero_flat(where)
    fs = {'compare': (lambda: t>cut, lambda: np.greater(t.numpy(), cut.numpy())), 'count': (where.count_nonzero, lambda: np.count_nonzero(where.numpy())),
          'find': (where.nonzero, lambda: nonzero_flat(where)), 'gather': (lambda: t[idx], lambda: t.index_select(0, idx)),
          'k-th highest': (lambda: t.topk(n//10, sorted=False).values.min(), lambda: _kth(t, n//10))}
    got = rounds({(name, i): f for name,both in fs.items() for i,f in enumerate(both)}, k)
    return {name: [[round(1e9*q/n, 4) for q in quantiles(got[name, i], n=4)] for i in (0, 1)] for name in fs}

# ------------------------------------------------------------ memory
def memory(name):
    "Measure what a sparse training holds beyond a dense one between two steps, in bytes a weight: masks, and all other tensors of the process"
    held = {}
    for sparse in (False, True):
        model = made(name, sparse)
        opt,method = optims['SGD'](model.parameters()), still()
        _,bs,shape,_ = works[name]
        for step in (1, 2, 3):
            F.cross_entropy(model(torch.randn(bs, *shape)), torch.randint(10, (bs,))).backward()
            if sparse: method.step(model, opt, step, total=10**7)
            else: opt.step()
        gc.collect()
        storages = [t.untyped_storage() for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        held[sparse] = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
        sizes = [(p.numel(), mask.untyped_storage().nbytes()) for *_,p,mask in masked_params(model)]
        del model,opt,storages
    n,masks = map(sum, zip(*sizes))
    return dict(weights=n, masks=round(masks/n, 4), others=round((held[True]-held[False]-masks)/n, 4))

# ------------------------------------------------------------ all of it
def plan():
    "List all measurements, the most important first: (name, threads, function, arguments)"
    for name in works: yield f'plain SGD {name}', 1, plain_steps, (name, 'SGD')
    for name in works: yield f'eval {name} batch {works[name][1]}', 1, evaluations, (name, works[name][1])
    for name in works: yield f'eval {name} batch 1', 1, evaluations, (name, 1)
    yield 'update ResNet-50', 1, updates, (None,)
    for name in works: yield f'fastai SGD {name}', 1, fastai_steps, (name, 'SGD')
    for name in works: yield f'parts {name}', 1, parts, (name,)
    for name in works: yield f'pass {name}', 1, passes, (name,)
    for name in works: yield f'memory {name}', 1, memory, (name,)
    yield 'square roots', 1, roots, ()
    yield 'primitives', 1, primitives, ()
    for name in works: yield f'plain AdamW {name}', 1, plain_steps, (name, 'AdamW')
    for name in works: yield f'plain AdamW, fused {name}', 1, plain_steps, (name, 'fused')
    for n in (1, 10, 100): yield f'update {n}M', 1, updates, (n*10**6,)
    for name in works:
        yield f'plain SGD {name}', 2, plain_steps, (name, 'SGD')
        yield f'fastai SGD {name}', 2, fastai_steps, (name, 'SGD')
        yield f'eval {name} batch {works[name][1]}', 2, evaluations, (name, works[name][1])
        yield f'eval {name} batch 1', 2, evaluations, (name, 1)
        yield f'pass {name}', 2, passes, (name,)
    yield 'update ResNet-50', 2, updates, (None,)

def quiet(res):
    "True if two dense networks were within 5 % of each other in half of the rounds, or if there was only one"
    twin = res.get('variants', {}).get('dense again')
    return not twin or twin['low']>0.95 and twin['high']<1.05

records = Records(__file__, lambda r: (r['name'], r['threads'], r['cpu']))

def found(name, threads):
    "Find a measurement: one row for each processor"
    return [r for key,r in records.done().items() if key[:2]==(name, threads)]

def main():
    ap = parser(__doc__, 'measurements')
    ap.add_argument('--again', action='store_true', help='also repeat what is there')
    ap.add_argument('--seconds', type=float, default=float('inf'), help='start no measurement after so many seconds')
    args,start = ap.parse_args(), time.perf_counter()
    warnings.simplefilter('ignore')
    for name,threads,f,arg in [] if args.table else plan():
        if not re.search(args.only, f'{name} {threads}') or (name, threads, hardware()['cpu']) in records.done() and not args.again or time.perf_counter()-start>args.seconds: continue
        torch.set_num_threads(threads)
        for tries in (1, 2, 3):
            res = f(*arg)
            if quiet(res): break
        print(records.add(dict(name=name, **res, tries=tries, **hardware())), flush=True)
    print(step_table(), parts_table(), pass_table(), eval_table(), update_table(), memory_table(), setting(), sep='\n\n')

# ------------------------------------------------------------ the tables
def markdown(head, rows):
    "Make a table in Markdown; columns of numbers are aligned to the right"
    to_right = [all(not r[i] or r[i][0].isdigit() for r in rows) for i in range(len(head))]
    return '\n'.join('| '+' | '.join(r)+' |' for r in [head, ['---:' if t else '---' for t in to_right], *rows])

def machine(r):
    "Name the processor of a row, in short"
    return re.sub(r'\(R\)| Processor', '', r['cpu'])

def show(r, k):
    "Format the ratio of variant `k`, with its quartiles"
    v = r['variants'].get(k)
    return f"{v['ratio']:.3f} ({v['low']:.3f}-{v['high']:.3f})" if v else ''

def step_table():
    "Tabulate training steps: sparse to dense, and dense to dense"
    kinds = ('plain SGD', 'plain AdamW', 'plain AdamW, fused', 'fastai SGD')
    rows = [[name, kind, machine(r), str(t), f"{r['ms']/r.get('batches', 1):.1f} ms", show(r, 'sparse'), show(r, 'dense again')]
            for name in works for kind in kinds for t in (1, 2) for r in found(f'{kind} {name}', t)]
    return markdown(['network', 'loop', 'processor', 'threads', 'dense step', 'sparse / dense', 'dense / dense'], rows)

def parts_table():
    "Tabulate the parts of a masked step"
    def cells(us): return [f"{us['step']/1000:.1f} ms", *(f"{us[k]/1000:.2f} ms" for k in ('gradients', 'weights', 'guards', 'engine'))]
    rows = [[name, machine(r), *cells(r['us'])] for name in works for r in found(f'parts {name}', 1)]
    return markdown(['network', 'processor', 'masked step', 'gradients masked', 'weights masked', 'guards', 'other work of the engine'], rows)

def pass_table():
    "Tabulate a pass over all gradients"
    def cell(w): return f"{w['ns']:.2f} ({w['low']:.2f}-{w['high']:.2f})"
    rows = [[name, f"{r['weights']/1e6:.1f} million", machine(r), str(t), *(cell(r['ways'][k]) for k in ('masked', 'uncompiled', 'floor'))]
            for name in works for t in (1, 2) for r in found(f'pass {name}', t)]
    return markdown(['network', 'weights', 'processor', 'threads', 'masked: ns a weight', 'without the compiled loop', 'times a number'], rows)

def eval_table():
    "Tabulate evaluations: with guards, with a hook that masks every time, with empty hooks, and the second dense network, each to dense"
    def ms(r, name, bs): return f"{r['ms']/(20 if (name, bs)==('MLP', 1) else 3):.2f} ms"
    rows = [[name, str(bs), machine(r), str(t), ms(r, name, bs), *(show(r, k) for k in ('sparse', 'always masking', 'empty hooks', 'dense again'))]
            for name in works for bs in (works[name][1], 1) for t in (1, 2) for r in found(f'eval {name} batch {bs}', t)]
    return markdown(['network', 'batch', 'processor', 'threads', 'dense', 'sparse / dense', 'always masking / dense', 'empty hooks / dense', 'dense / dense'], rows)

def update_table():
    "Tabulate updates: seconds and memory"
    rows = [[name, str(r['tensors']), f"{r['weights']/1e6:.1f} million", machine(r), str(t), f"{r['seconds']:.3f} s ({r['low']:.3f}-{r['high']:.3f})", f"{1e9*r['seconds']/r['weights']:.1f} ns", f"{r['live_mib']:.1f} MiB", f"{r['peak_mib']:.1f} MiB", f"{r['largest_mib']:.1f} MiB"]
            for name in ('ResNet-50', '1M', '10M', '100M') for t in (1, 2) for r in found(f'update {name}', t)]
    return markdown(['network', 'tensors', 'weights', 'processor', 'threads', 'one update', 'a weight', 'memory in use on top', 'with what was freed', 'largest layer'], rows)

def primitive_table():
    "Tabulate what torch has, and what the engine uses"
    r = found('primitives', 1)[-1]
    by = dict(compare='`t > cut`; numpy', count='`count_nonzero`; numpy', find='`nonzero`; compiled loop', gather='`t[idx]`; `index_select`') | {'k-th highest': '`topk`; numpy'}
    return markdown(['work', 'in torch; in the engine', 'in torch: ns a number', 'in the engine: ns a number'], [[k, by[k], *(f"{mid:.2f} ({lo:.2f}-{hi:.2f})" for lo,mid,hi in r[k])] for k in by if k in r])

def memory_table():
    "Tabulate what stays resident"
    rows = [[name, f"{r['weights']/1e6:.1f} million", f"{r['masks']:.4f}", f"{r['others']:.4f}"] for name in works for r in found(f'memory {name}', 1)[-1:]]
    return markdown(['network', 'weights', 'masks, bytes a weight', 'all other tensors, bytes a weight'], rows)

def setting():
    "Say where this was measured"
    seen = sorted({f"{r['cpu']}, torch {r['torch']}, Python {r['python']}" for r in records.done().values()})
    return 'Measured on '+' and '.join(seen)+'.'

if __name__=='__main__': main()
