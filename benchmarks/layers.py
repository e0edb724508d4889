"""Sparse layers against dense ones, and against what else there is for a CPU.

    python benchmarks/layers.py PART [--threads 2] [--other FOLDER]     # appends to layers.jsonl; each part takes some two minutes
    python benchmarks/layers.py --table                                 # prints the latest rows as tables

Parts: `linear` (inference of one layer), `cold` (the same with weights that come from memory), `pointwise` and `three` (inference of convolutions), `train` (whole training steps, batch 128; `train4096` with hidden layers of 4096), `memory` (bytes while training: what lies between two steps, what the process grows by in a step and in one that rewires, and the most of it all against dense), `conv_train` (training steps of ResNet-18 on small images), `blocks` (how many inputs the kernel takes at a time). Everything is measured in one process in interleaved rounds: a ratio is the median of the rounds' ratios to the dense layer, its spread their quartiles. With two threads onnxruntime, whose threads go on spinning for a while after each run, comes after the rest. All forms get the same inputs, and
outputs are compared. `--other` names a folder with the package `sparselab` (`pip install --target FOLDER sparselab`)."""
import argparse, copy, ctypes, importlib, itertools, json, os, random, re, statistics, subprocess, sys, time, warnings
from pathlib import Path
import torch, torch.nn.functional as F
from torch import nn
warnings.simplefilter('ignore')
from sparsefast.core import *
from sparsefast.storage import *
from sparsefast.masks import sparse_params
from sparsefast.methods import DSTMethod
from sparsefast import ops
from records import processor

out = Path(__file__).with_suffix('.jsonl')

def quartiles(xs):
    xs = sorted(xs)
    return [xs[len(xs)//4], xs[len(xs)//2], xs[(3*len(xs))//4]]

def interleaved(fs, rounds, least=.004):
    "name -> (median microseconds, quartiles of the ratio to the first)"
    reps,times = {}, {n: [] for n in fs}
    for n,f in fs.items():
        f()
        start = time.perf_counter()
        f()
        reps[n] = max(1, int(least/(time.perf_counter()-start)))
    rng,alone = random.Random(0), [n for n in fs if n.startswith('onnx') and torch.get_num_threads()>1]
    for group in ([n for n in fs if n not in alone], *([n] for n in alone)):
        for i in range(rounds+1):                                            # the first does not count: memory is still being found
            for n in rng.sample(group, len(group)):
                start = time.perf_counter()
                for _ in range(reps[n]): fs[n]()
                if i: times[n].append((time.perf_counter()-start)/reps[n]*1e6)
    first = times[next(iter(fs))]
    return {n: dict(us=round(statistics.median(ts), 1), times=[round(q, 3) for q in quartiles([a/b for a,b in zip(first, ts)])]) for n,ts in times.items()}

def write(part, threads, **row):
    import onnxruntime
    row = dict(part=part, threads=threads, **row, cpu=processor(), kernel=getattr(ops._kernels, 'processor', 'torch'), torch=torch.__version__, onnxruntime=onnxruntime.__version__, when=time.strftime('%Y-%m-%d'))
    with open(out, 'a') as f: f.write(json.dumps(row)+'\n')
    print(json.dumps({k: v for k,v in row.items() if k not in ('cpu','torch','onnxruntime','when')}), flush=True)

# ------------------------------------------------------------ inference
def onnx_session(layer, x, threads, int8=False):
    import io, onnxruntime as ort, tempfile, logging
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as d:
        torch.onnx.export(layer, (x,), f'{d}/a.onnx', dynamo=False)
        if int8:
            from onnxruntime.quantization import quantize_dynamic
            quantize_dynamic(f'{d}/a.onnx', f'{d}/b.onnx')
        o = ort.SessionOptions()
        o.intra_op_num_threads,o.log_severity_level = threads,3
        s = ort.InferenceSession(f'{d}/{"b" if int8 else "a"}.onnx', o, providers=['CPUExecutionProvider'])
    name,v = s.get_inputs()[0].name,x.numpy()
    return lambda: s.run(None, {name: v})[0]

def blocks(layer, size=32):
    "The same share of weights in whole blocks"
    o,i = layer.weight.shape
    keep = torch.rand(o//size, i//size).flatten().argsort()[:max(1, round(float(layer.weight_mask.float().mean())*(o//size)*(i//size)))]
    m = torch.zeros((o//size)*(i//size), dtype=torch.bool)
    m[keep] = True
    return (torch.randn(o, i)*m.view(o//size, i//size).repeat_interleave(size, 0).repeat_interleave(size, 1)).to_sparse_bsr(size)

def check(fs, dense, tol):
    want = fs[dense]()
    for n in tol:
        if n in fs: assert (e := float((torch.as_tensor(fs[n]()).float()-want).norm()/want.norm()))<tol[n], (n, e)

@torch.no_grad()
def linear(threads, rounds=21, other=None, **kw):
    if other: sys.path.insert(0, other)
    for o,i in ((1024,1024), (768,3072), (3072,768), (4096,1024)):
        for s in (.8, .9, .95, .98):
            torch.manual_seed(0)
            layer = nn.Linear(i, o)
            masked = copy.deepcopy(layer).eval()
            sparsify_model(masked, s)
            sparse = SparseLinear.from_masked(masked)
            layer.weight.copy_(masked.weight)
            theirs = importlib.import_module('sparselab').SparseLinear(i, o, sparsity=s).eval() if other else None      # with weights of its own, as many
            half,csr,bsr = copy.deepcopy(layer).bfloat16(),layer.weight.detach().to_sparse_csr(),blocks(masked)
            for b in (1, 16, 128):
                x = torch.randn(b, i)
                xb = x.bfloat16()
                fs = dict(dense=lambda: layer(x), sparse=lambda: sparse(x), masked=lambda: masked(x), csr=lambda: F.linear(x, csr, layer.bias))
                if s in (.9, .95):
                    fs |= dict(bfloat16=lambda: half(xb), bsr=lambda: F.linear(x, bsr, layer.bias), onnx=onnx_session(layer, x, threads), onnx_int8=onnx_session(layer, x, threads, True))
                check(fs, 'dense', dict(sparse=1e-5, masked=1e-6, csr=1e-5, bfloat16=.02, onnx=1e-5, onnx_int8=.1))
                if theirs: fs['sparselab'] = lambda: theirs(x)
                write('linear', threads, shape=[o, i], sparsity=s, batch=b, **interleaved(fs, rounds, .002))

@torch.no_grad()
def cold(threads, rounds=21, **kw):
    "As in a network that no cache holds: copies of a layer take turns, so that each call reads its weights from memory"
    for o,i in ((1024,1024), (768,3072), (3072,768)):
        for s in (.9, .95):
            torch.manual_seed(0)
            layer = nn.Linear(i, o)
            sparsify_model(masked := copy.deepcopy(layer), s)
            sparse = SparseLinear.from_masked(masked)
            layer.weight.copy_(masked.weight)
            many = int(96e6//(8*len(sparse.values)))
            turns = {n: itertools.cycle([copy.deepcopy(m) for _ in range(k)]) for n,m,k in (('dense', layer, min(many, 50)), ('sparse', sparse, many))}
            for b in (1, 16):
                x = torch.randn(b, i)
                fs = {n: (lambda n=n: next(turns[n])(x)) for n in turns}
                check(fs, 'dense', dict(sparse=1e-5))
                write('cold', threads, shape=[o, i], sparsity=s, batch=b, **interleaved(fs, rounds))

@torch.no_grad()
def convs(part, threads, cases, sparsities=(.9, .95), rounds=11):
    for c,o,k,hw in cases:
        for s in sparsities:
            torch.manual_seed(0)
            layer = nn.Conv2d(c, o, k, padding=k//2)
            masked = copy.deepcopy(layer)
            sparsify_model(masked, s)
            sparse = SparseConv2d.from_masked(masked)
            layer.weight.copy_(masked.weight)
            for b in (1, 8):
                x = torch.randn(b, c, hw, hw)
                fs = dict(dense=lambda: layer(x), sparse=lambda: sparse(x), masked=lambda: masked(x))
                if b==1: fs |= dict(onnx=onnx_session(layer, x, threads))
                check(fs, 'dense', dict(sparse=1e-5, onnx=1e-5))
                write(part, threads, shape=[o, c, k, k], pixels=hw, sparsity=s, batch=b, **interleaved(fs, rounds))

def pointwise(threads, **kw): convs('pointwise', threads, ((64,256,1,56), (256,64,1,56), (512,128,1,28), (256,1024,1,14), (1024,256,1,14), (2048,512,1,7), (512,2048,1,7)))
def three(threads, **kw): convs('three', threads, ((64,64,3,56), (128,128,3,28), (256,256,3,14), (512,512,3,7)))

# ------------------------------------------------------------ training
def mlp(h): return nn.Sequential(nn.Linear(784, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 10))
opts = dict(sgd=lambda ps: torch.optim.SGD(ps, lr=.01, momentum=.9), adam=lambda ps: torch.optim.Adam(ps, lr=1e-3), adam_fused=lambda ps: torch.optim.Adam(ps, lr=1e-3, fused=True))

class Run:
    "A model in training: `step()` is one optimizer step, `update()` one that rewires"
    def __init__(self, model, opt, dst=False, every=100):
        self.model,self.opt,self.n = model,opts[opt](model.parameters()),0
        self.dst = DSTMethod(**{**RigL_presets, 'batches_per_update': every}) if dst else None
        if self.dst: self.dst.check(model, self.opt), self.dst.enforce(model, self.opt)
    def __call__(self, x, y):
        self.n += 1
        self.opt.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        if self.dst: self.dst.step(self.model, self.opt, self.n, (self.n-1)/1e6)
        else: self.opt.step()

def other_mlp(h, s, folder):
    "The same network of sparselab's layers"
    sys.path.insert(0, folder)
    import sparselab
    return nn.Sequential(sparselab.SparseLinear(784, h, sparsity=s), nn.ReLU(), sparselab.SparseLinear(h, h, sparsity=s), nn.ReLU(), sparselab.SparseLinear(h, 10, sparsity=s))

def in_turns(runs, x, y, rounds, block):
    "name -> milliseconds of a step, with an update amortised over 100 steps, and quartiles of the ratio to dense"
    for k,r in list(runs.items()):
        try: r(x, y), r(x, y)
        except IndexError as e:                                              # sparselab 0.2.2, after another model of its own
            if k!='sparselab': raise
            print(f'{k} is left out: {e}', flush=True)
            del runs[k]
    ts,extra = {k: [] for k in runs}, {}
    for _ in range(rounds):
        for k,r in runs.items():
            r(x, y)                                                  # the other one's data leaves the cache
            start = time.perf_counter()
            for _ in range(block): r(x, y)
            ts[k].append((time.perf_counter()-start)*1e3/block)
    for k in ('sparse', 'masked'):                                   # a step that looks at gradients and rewires, in place of an ordinary one
        extra[k] = []
        for _ in range(block):
            runs[k].n = 98
            runs[k](x, y)
            start = time.perf_counter()
            runs[k](x, y)
            extra[k].append((time.perf_counter()-start)*1e3)
    row = {}
    for k in runs:
        u = statistics.median(extra[k]) if k in extra else 0
        whole = [t if k not in extra else (99*t+u)/100 for t in ts[k]]
        row[k] = dict(ms=round(statistics.median(whole), 3), update_ms=round(u, 2), times=[round(q, 3) for q in quartiles([a/b for a,b in zip(ts['dense'], whole)])])
    return row

def train(threads, h=1024, rounds=15, other=None, only=None, block=4, optimizers=('sgd', 'adam', 'adam_fused'), **kw):
    "Ordinary steps in interleaved rounds; then whole periods of an update and what comes before it, to amortise the update over 100 steps"
    x,y = torch.randn(128, 784),torch.randint(10, (128,))
    for s in only or (.8, .9, .95, .98):
        for opt in optimizers:
            def make(kind):
                torch.manual_seed(0)
                model = mlp(h)
                if kind in ('masked', 'sparse'): sparsify_model(model, s)
                if kind=='sparse': to_sparse_layers(model, least=0.)
                return Run(other_mlp(h, s, other) if kind=='sparselab' else model, opt, kind in ('masked', 'sparse'))
            runs = {k: make(k) for k in ('dense', 'sparse', 'masked', *(['sparselab'] if other else []))}
            write('train', threads, hidden=h, batch=128, sparsity=s, opt=opt, **in_turns(runs, x, y, rounds, block))

# ------------------------------------------------------------ memory
def tensors(model, opt):
    "Bytes of weights, gradients, optimizer state and what a sparse layer has besides: its index, and what is derived from it"
    derived = [t for m in model.modules() for v in getattr(m, '_cache', {}).values() for t in (v if isinstance(v, tuple) else (v,)) if torch.is_tensor(t)]
    state = [v for st in opt.state.values() for v in st.values() if torch.is_tensor(v)]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return sum({t.data_ptr(): t.numel()*t.element_size() for t in [*model.parameters(), *model.buffers(), *grads, *state, *derived]}.values())

def risen(f):
    "Bytes that the process grows by at most while `f()` runs"
    status = lambda what: 1024*int(re.search(what+r':\s+(\d+)', Path('/proc/self/status').read_text())[1])
    ctypes.CDLL(None).malloc_trim(0)                                         # freed memory that is still resident would hide a rise
    Path('/proc/self/clear_refs').write_text('5')
    had = status('VmRSS')
    f()
    return status('VmHWM')-had

def memory_of(kind, h, s):
    "What is resident between two steps, and what a step, and one that rewires, needs on top"
    torch.manual_seed(0)
    x,y,model = torch.randn(128, 784),torch.randint(10, (128,)),mlp(h)
    if kind!='dense': sparsify_model(model, s)
    if kind=='sparse': to_sparse_layers(model, least=0.)
    run = Run(model, 'adam', kind!='dense')
    rises = {'step': [], 'update': []}
    for i in range(4):                                                       # the first does not count: code is being loaded
        for what,n in dict(other=98, update=99, step=100).items():           # the step before one that rewires is that at which layers are told
            run.n = n+100*i
            rise = risen(lambda: run(x, y))
            if i and what in rises: rises[what].append(rise)
    return dict(resident=tensors(model, run.opt), **{k: statistics.median(v) for k,v in rises.items() if k=='step' or kind!='dense'})

def memory(threads, **kw):
    for h,s in itertools.product((1024, 4096), (.9, .95, .98)):
        row = {}
        for kind in ('dense', 'masked', 'sparse'):                           # a process for each, in which freed memory goes back at once
            child = f'import torch, json, layers; torch.set_num_threads({threads}); print(json.dumps(layers.memory_of({kind!r}, {h}, {s})))'
            row[kind] = json.loads(subprocess.run([sys.executable, '-W', 'ignore', '-c', child], env={**os.environ, 'MALLOC_MMAP_THRESHOLD_': '65536'}, cwd=out.parent, capture_output=True, text=True, check=True).stdout)
        most = {k: v['resident']+max(v['step'], v.get('update', 0)) for k,v in row.items()}
        write('memory', threads, hidden=h, sparsity=s, opt='adam', **row, of_dense={k: round(m/most['dense'], 3) for k,m in most.items()})

# ------------------------------------------------------------ training convolutions
def conv_train(threads, rounds=5, only=None, **kw):
    "Whole training steps of ResNet-18 on 32x32 images, its first convolution 3x3 without pooling, batch 64; SGD with momentum, an update each 100 steps amortised"
    import torchvision
    x,y = torch.randn(64, 3, 32, 32),torch.randint(10, (64,))
    for s in only or (.9, .95):
        def make(kind):
            torch.manual_seed(0)
            model = torchvision.models.resnet18(num_classes=10)
            model.conv1,model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False),nn.Identity()
            if kind!='dense': sparsify_model(model, s, exclude=['conv1', 'fc'])
            if kind=='sparse': to_sparse_layers(model, least=0.)
            return Run(model, 'sgd', kind!='dense')
        runs = {k: make(k) for k in ('dense', 'sparse', 'masked')}
        write('conv_train', threads, batch=64, pixels=32, sparsity=s, opt='sgd', **in_turns(runs, x, y, rounds, 1))

# ------------------------------------------------------------ how many inputs a block has
def by_block(room, layer, x, g):
    "name -> a call of the layer with blocks of so many KiB of inputs: outputs (`y`) and gradients of values (`g`); `room(kib)` says so to the layer's room"
    def call(kib, f):
        def run():
            room(kib)
            return f()
        return run
    return {f'{what}{kib}': call(kib, f) for kib in (32, 64, 128, 256) for what,f in (('y', lambda: layer(x)), ('g', lambda: layer._values_grad(g, x)))}

@torch.no_grad()
def blocks(threads, rounds=13, **kw):
    "Products by blocks of several sizes, from which `kernels.cache`, and its half for convolutions larger than a pixel, come"
    from sparsefast.storage import kernels, planes
    chosen = kernels.cache
    for o,i,n in ((1024,1024,128), (4096,4096,128), (384,1536,197), (1536,384,197), (768,3072,128)):
        for s in (.9, .95):
            sparsify_model(dense := nn.Linear(i, o), s)
            layer,x,g = SparseLinear.from_masked(dense),torch.randn(n, i), torch.randn(n, o)
            dense = unsparsify_model(dense)
            def room(kib): kernels.cache = kib<<10
            write('blocks', threads, shape=[o, i], sparsity=s, batch=n, **interleaved({'dense': lambda: dense(x), **by_block(room, layer, x, g)}, rounds))
    kernels.cache = chosen
    for c,o,k,hw in ((64,64,3,56), (128,128,3,28), (256,256,3,14), (512,512,3,7), (256,64,1,56), (1024,256,1,14), (512,2048,1,7)):
        for s in (.9, .95, .98):
            sparsify_model(dense := nn.Conv2d(c, o, k, padding=k//2, bias=False), s)
            layer,x,g = SparseConv2d.from_masked(dense),torch.randn(8, c, hw, hw), torch.randn(8, o, hw, hw)
            dense = unsparsify_model(dense)
            def room(kib): planes.cache = (kib<<10)*(2 if k>1 else 1)
            write('blocks', threads, shape=[o, c, k, k], pixels=hw, sparsity=s, batch=8, **interleaved({'dense': lambda: dense(x), **by_block(room, layer, x, g)}, rounds//2))
    planes.cache = chosen

# ------------------------------------------------------------ tables
def table():
    rows = {}
    for r in map(json.loads, open(out)): rows[json.dumps([r.get(k) for k in ('part', 'cpu', 'threads', 'shape', 'pixels', 'hidden', 'opt', 'sparsity', 'batch', 'columns')])] = r
    for part,cpu in dict.fromkeys((r['part'], r['cpu']) for r in rows.values()):
        for threads in (1, 2):
            mine = [r for r in rows.values() if (r['part'], r['cpu'], r['threads'])==(part, cpu, threads)]
            if not mine: continue
            kinds = list(dict.fromkeys(k for r in mine for k,v in r.items() if isinstance(v, dict)))
            print(f"\n{part}, {threads} thread{'s' if threads>1 else ''}: {cpu}, torch {mine[0]['torch']}" + (', bytes' if part=='memory' else '; times as fast as the first (quartiles)'))
            for r in mine:
                what = ' '.join(f"{k} {'x'.join(map(str, r[k])) if isinstance(r[k], list) else r[k]}" for k in ('shape', 'pixels', 'hidden', 'opt', 'sparsity', 'batch', 'columns') if k in r)
                cell = lambda v: ' '.join(f'{k} {n/1e6:.1f}M' if n>1e3 else f'{k} {n}' for k,n in v.items()) if part=='memory' else f"{v['times'][1]:.2f} ({v['times'][0]:.2f}-{v['times'][2]:.2f})"
                print(what, *(f'| {k} {cell(r[k])}' for k in kinds if k in r))

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', nargs='?', choices=['linear', 'cold', 'pointwise', 'three', 'train', 'train4096', 'memory', 'conv_train', 'blocks'])
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--other')
    parser.add_argument('--sparsity', type=float, nargs='*')
    parser.add_argument('--table', action='store_true')
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.part=='train4096': train(a.threads, 4096, 5, a.other, a.sparsity or (.9, .95, .98), 2, ('adam',))
    elif a.part: globals()[a.part](a.threads, other=a.other, **(dict(only=a.sparsity) if a.sparsity else {}))
    if a.table: table()
