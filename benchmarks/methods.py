"""Every method on Fashion-MNIST, at four sparsities, from the same initial weights and batches.

    python benchmarks/methods.py            # runs what methods.jsonl lacks, then prints the tables
    python benchmarks/methods.py --table    # only prints them

Each run is one thread, plain PyTorch and `DSTMethod.step`. `--only REGEX` picks those whose name, as printed, matches: several processes can share the work. Accuracy is that of the last epoch on the 10,000 test images, in [0,1]. `nnz` counts the weights of linear layers and
convolutions that are not zero; `flops` is the cost of the training as a share of the dense one's, multiply-adds of these layers only: 1 for the forward pass and
2 for the backward pass by the active weights of each step, and the whole gradient where a method looks at it. Budgets: `epochs` gives every run the same number of epochs; `flops` gives methods that are
denser on their way, or look at all gradients at each step, as many as cost what a static mask costs (at least one). `masks` says how the masks were made. The committed runs took 13 core-hours, most of them beside other work."""
import math, time
from collections import defaultdict
from functools import partial
from itertools import product
from statistics import mean, median, stdev
import torch
from torch import nn
from torch.nn import functional as F
from fastcore.basics import noop
from sparsefast.all import *
from sparsefast.cli.datasets import fashion_arrays
from sparsefast.scores import reads
from records import Records, hardware, parser, words

sparsities, seeds = (0.9, 0.95, 0.98, 0.99), (0, 1, 2)
recipe = dict(bs=128, lr=0.1, momentum=0.9, weight_decay=5e-4, warmup_epochs=1, update_bn=False)   # `update_bn`: batch norms' statistics once more, over the training images, in the end
epochs = {'LeNet-300-100': 12, 'convnet': 6, 'resnet': 3}

# ------------------------------------------------------------ networks; `w` scales their width
def lenet(w=1.): return nn.Sequential(nn.Flatten(), nn.Linear(784, n(300,w)), nn.ReLU(), nn.Linear(n(300,w), n(100,w)), nn.ReLU(), nn.Linear(n(100,w), 10))

def n(channels, w): return max(1, round(channels*w))

def conv(i, o, stride=1): return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o))

def convnet(w=1.):
    a,b,c,d = (n(k, w) for k in (16, 32, 64, 128))
    return nn.Sequential(conv(1, a, 2), nn.ReLU(), conv(a, b, 2), nn.ReLU(), conv(b, c, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16*c, d), nn.ReLU(), nn.Linear(d, 10))

class Block(nn.Module):
    "Two convolutions and a way around them"
    def __init__(self, i, o, stride=1):
        super().__init__()
        self.convs = nn.Sequential(conv(i, o, stride), nn.ReLU(), conv(o, o))
        self.short = nn.Identity() if i==o and stride==1 else nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
    def forward(self, x): return F.relu(self.convs(x)+self.short(x))

def resnet(w=1.):
    "Nine convolutions on the way, 150,800 weights at width 1"
    a,b,c = (n(k, w) for k in (16, 32, 64))
    return nn.Sequential(conv(1, a, 2), nn.ReLU(), Block(a, a), Block(a, b, 2), Block(b, c, 2), Block(c, c), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))

nets = {'LeNet-300-100': lenet, 'convnet': convnet, 'resnet': resnet}

def data():
    "Images as normalised float tensors, and labels: (train, test)"
    (x,y),(xt,yt) = [(torch.tensor(x)[:,None].float()/255, torch.tensor(y).long()) for x,y in fashion_arrays()]
    m,s = x.mean(), x.std()
    return ((x-m)/s, y), ((xt-m)/s, yt)

# ------------------------------------------------------------ methods: (preset, optimizer steps between updates as a share of training or `None` for the preset's own, how the masks are made)
def by_score(make):
    "Masks by a score at initialisation: `make(model, x, y, sparsity)` gives the score function"
    def masks(model, x, y, s):
        score = make(model, x, y, s)
        return dict(sparse_f=global_sparsity(score), score_f=score)
    return masks

def of_each_class(x, y, k): return torch.cat([(y==c).nonzero()[:k,0] for c in range(10)])

def grasp(model, x, y, s):
    idx = of_each_class(x, y, 25)
    return grasp_score(model, F.cross_entropy, x[idx], y[idx])

def run_at(preset, every, **kw):
    "The interval (and span) of the committed runs, which are the published ones: presets have shares of training"
    return {**preset, 'batches_per_update': every, **kw}

methods = {
    'static':         (Static_presets, None, None),
    'SNIP':           (Static_presets, None, by_score(lambda m,x,y,s: snip_score(m, F.cross_entropy, x[:128], y[:128]))),
    'GraSP':          (Static_presets, None, by_score(grasp)),
    'SynFlow':        (Static_presets, None, by_score(lambda m,x,y,s: synflow_score(m, x[:1], s))),
    'magnitude':      (Static_presets, None, by_score(lambda m,x,y,s: weight_magnitude)),
    'SET':            (run_at(SET_presets, None), None, None),
    'SET, original':  (SET_original_presets, None, None),
    'SNFS':           (run_at(SNFS_presets, None), None, None),
    'RigL':           (run_at(RigL_presets, 100), None, None),
    'RigL, averaged': (RigL_avg_presets, 1/12, None),
    'SET-ITOP':       (SET_ITOP_presets, 1500/97_600, None),             # of its 250 epochs of CIFAR
    'RigL-ITOP':      (RigL_ITOP_presets, 4000/97_600, None),
    'DSR':            (run_at(DSR_presets, 100), None, None),
    'MEST':           (MEST_presets, 5/160, None),
    'MEST, soft':     (MEST_soft_presets, 5/160, None),
    'Top-KAST':       (TopKAST_presets, None, None),
    'SRigL':          (run_at(SRigL_presets, 100), None, None),
    'GMP':            (run_at(GMP_presets, 100, sparsity_span=(10/32, 25/32)), None, None),
    'GraNet':         (run_at(GraNet_presets, 1000, sparsity_span=(0., .3)), 1000/62_400, None),               # of its 160 epochs of CIFAR
    'GraNet, half':   (run_at(GraNet_half_presets, 1000, sparsity_span=(0., .3)), 1000/62_400, None),
    'AC/DC':          (ACDC_presets, 0.01, None),                        # the preset's own
}
def without(**changes): return {**RigL_avg_presets, **changes}

def use(**kw): return lambda *args: kw

def tiny_dense(params, sparsity):
    "ERK, but layers with less than a hundredth of the weights stay dense"
    n = [p.numel() for p in params]
    small = [k<sum(n)/100 for k in n]
    rest = [p for p,t in zip(params, small) if not t]
    some = iter(erdos_renyi_sparsity(rest, sparsity*sum(n)/sum(p.numel() for p in rest)))
    return [0. if t else next(some) for t in small]

ablation = {                                                             # 'RigL, averaged', with one of its ingredients changed: a method as above, and changes of the recipe
    'one gradient':         (without(grad_steps=1), 1/12, None),
    'no redistribution':    (without(redistribute_f=None), 1/12, None),
    'fraction 0.3':         (without(initial_drop_grow_pct=0.3), 1/12, None),
    'until 75 %':           (without(stop_pct=0.75), 1/12, None),
    'each 100 steps':       (without(batches_per_update=100), None, None),
    'in the step\'s place': (without(replaces_step=True), 1/12, None),
    'sparse-aware init':    (RigL_avg_presets, 1/12, use(init_f=sparse_kaiming_normal_)),
    'rows may empty':       (without(keep_score_f=weight_magnitude), 1/12, None),
    'uniform':              (RigL_avg_presets, 1/12, use(sparse_f=uniform_sparsity)),
    'tiny layers dense':    (RigL_avg_presets, 1/12, use(sparse_f=tiny_dense)),
    'no warm-up':           (RigL_avg_presets, 1/12, None, dict(warmup_epochs=0)),
    'half the rate':        (RigL_avg_presets, 1/12, None, dict(lr=0.05)),
    'norms re-estimated':   (RigL_avg_presets, 1/12, None, dict(update_bn=True)),
}
def changes(net, m): return m in ('no redistribution', 'rows may empty', 'tiny layers dense') if net=='resnet' else net=='convnet' or m!='norms re-estimated'     # which of them a network sees

denser   = ('SNFS', 'RigL, averaged', 'MEST, soft', 'Top-KAST', 'GMP', 'GraNet', 'GraNet, half', 'AC/DC')
leading  = ('static', 'SET', 'SNFS', 'RigL', 'RigL, averaged', 'Top-KAST', 'GMP', 'GraNet', 'GraNet, half', 'AC/DC')   # those the residual network sees, at 95 and 98 %: three that all compare with, and those that lead on the others

# ------------------------------------------------------------ what a step costs
def positions(model, x):
    "How often each weight of a layer is used for an image"
    seen,hooks = {},[]
    for m in sparseable_modules(model):
        hooks.append(m.register_forward_hook(lambda m, i, o: seen.update({m: o[0,0].numel() if o.dim()==4 else 1})))
    model.eval()(x[:1])
    for h in hooks: h.remove()
    return seen

def cost(uses, dense=False): return sum(k*(m.weight.numel() if dense or not hasattr(m, 'weight_mask') else int(m.weight_mask.sum())) for m,k in uses.items())

class Meter:
    "Multiply-adds of a training, step by step"
    def __init__(self, model, x, dst, look_every=20):
        self.uses,self.dst,self.total,self.look_every = positions(model, x), dst, 0., look_every
        self.full = cost(self.uses, dense=True)
        wants_all = any('momentum' in reads(f) for f in ((dst.keep_score_f, dst.grow_score_f) if dst else ()))
        self.always = wants_all or dst is not None and dst.explore_pct==1.
        self.updates = dst is not None and 'gradient' in reads(dst.grow_score_f) and dst.initial_drop_grow_pct>0
        self.always = self.always or dst is not None and dst.grad_steps is None            # (a few of the last steps, strictly, do without)
    def __call__(self, step, pct):
        if step%self.look_every==1: self.now = cost(self.uses)
        if self.dst is None: self.total += 3*self.full; return
        extra = self.dst.explore_pct*self.full if self.dst.explore_pct<1 else 0.
        all_grads = self.always or self.updates and self.dst.due(step, pct)
        self.total += 2*self.now + (self.full if all_grads else min(self.now+extra, self.full))
    def share(self, steps): return self.total/(3*self.full*steps)

# ------------------------------------------------------------ one run
def lr_at(step, total, warm, lr):
    "Linear warm-up, then a cosine to zero"
    return lr*(step/warm if step<=warm else (1+math.cos(math.pi*(step-warm)/(total-warm)))/2)

def started(model, method, sparsity, total, seed, dsets):
    "The method of a run, its masks made; and how they were made"
    (x,y),_ = dsets
    preset,share,masks = (methods|ablation)[method][:3]
    every = round(share*total) if share else preset['batches_per_update'] or len(x)//recipe['bs']              # as the callback fills it in
    dst = DSTMethod(**{**preset, 'batches_per_update': max(1, every), 'seed': seed})
    kw = masks(model, x, y, sparsity) if masks else {}
    kw = {'sparse_f': erdos_renyi_sparsity, **dst.start(sparsity), **kw}
    sparsify_model(model, sparsity, **kw)
    return dst, {k: named(v) for k,v in kw.items()}

def named(v):
    "A function's name, with those of the functions it was made of; or a value"
    if isinstance(v, partial): return f"{named(v.func)}({', '.join(f'{k}={named(x)}' for k,x in v.keywords.items() if callable(x))})"
    return v.__name__ if callable(v) else v

def width(net, sparsity):
    "The width at which a dense network has as many weights as the sparse one"
    count = lambda w: sum(m.weight.numel() for m in sparseable_modules(nets[net](w)))
    goal,widths = (1-sparsity)*count(1.), [i/1000 for i in range(5, 1000)]
    return min(widths, key=lambda w: abs(count(w)-goal))

def train(net, method, sparsity, seed, dsets, n_epochs=None, look=noop, **changes):
    "One run from start to end; returns its record. `look(model)` sees what came out"
    (x,y),(xt,yt) = dsets
    own = dict(*(methods|ablation).get(method, ())[3:])
    n_epochs,opts,start = n_epochs or epochs[net], {**recipe, **own, **changes}, time.perf_counter()
    torch.manual_seed(seed)
    model = nets[net](width(net, sparsity) if method=='small dense' else 1.).to(memory_format=torch.channels_last)
    bs,n_iter = opts['bs'], len(x)//opts['bs']
    total,step = round(n_iter*n_epochs), 0
    dst,masks = started(model, method, sparsity, total, seed, dsets) if method in methods|ablation else (None, None)
    opt = torch.optim.SGD(model.parameters(), lr=0., momentum=opts['momentum'], weight_decay=opts['weight_decay'])
    meter,batches = Meter(model, x, dst), torch.Generator().manual_seed(seed)
    while step<total:
        model.train()
        for idx in torch.randperm(len(x), generator=batches)[:n_iter*bs].view(n_iter, bs)[:total-step]:
            step += 1
            for g in opt.param_groups: g['lr'] = lr_at(step, total, min(n_iter*opts['warmup_epochs'], total/2), opts['lr'])
            F.cross_entropy(model(x[idx].contiguous(memory_format=torch.channels_last)), y[idx]).backward()
            meter(step, (step-1)/total)
            if dst: dst.step(model, opt, step, (step-1)/total)
            else: opt.step()
            opt.zero_grad()
    if opts['update_bn']: torch.optim.swa_utils.update_bn(x.split(1000), model)
    model.eval()
    with torch.no_grad(): acc = (torch.cat([model(b) for b in xt.split(1000)]).argmax(1)==yt).float().mean().item()
    look(model)
    layers = sparseable_modules(model)
    return dict(net=net, method=method, sparsity=sparsity, seed=seed, epochs=round(n_epochs, 2), accuracy=round(acc, 4), weights=sum(m.weight.numel() for m in layers),
                nnz=sum(int(m.weight.count_nonzero()) for m in layers), active=sum(int(mask.sum()) for _,mask,_ in sparse_params(model)), empty_rows=sum(int((m.weight.flatten(1)==0).all(1).sum()) for m in layers),
                flops=round(meter.share(total), 4), seconds=round(time.perf_counter()-start, 1), settings=repr(dst), masks=masks, **opts, **hardware())

# ------------------------------------------------------------ all runs
def key(r): return r['net'], r['method'], r['sparsity'], r['seed'], r['budget']

records = Records(__file__, key)
done = records.done

def plan():
    "All runs: (net, method, sparsity, seed, budget), the most telling first"
    for levels in ((0.95, 0.98), (0.9, 0.99)):
        telling = levels[0]==0.95
        for seed,net in product(seeds, nets if telling else list(nets)[:2]):
            if telling: yield net, 'dense', 0., seed, 'epochs'
            known = [m for m in methods if net!='resnet' or m in leading]
            changed = [m for m in ablation if changes(net, m)] if telling else ()
            for s,m in product(levels, (*known, 'small dense', *changed)): yield net, m, s, seed, 'epochs'
        for seed,net,s,m in product(seeds, nets if telling else list(nets)[:2], levels, denser):
            if net!='resnet' or m in leading: yield net, m, s, seed, 'flops'

def epochs_for(net, method, sparsity, budget, runs):
    "So many, at least one, that the run costs what a static mask costs over the full number of epochs; `None` while the runs that show what it costs are missing"
    if budget=='epochs': return epochs[net]
    cost = lambda m: next((r['flops'] for k,r in runs.items() if k[:3]==(net, m, sparsity) and k[4]=='epochs'), None)
    if None not in (a := cost('static'), b := cost(method)): return max(1., epochs[net]*a/b)

def main():
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    dsets = None if args.table else data()
    for r in [] if args.table else records.lacking(plan(), words, args.only):
        net,method,s,seed,budget = r
        n_epochs = epochs_for(net, method, s, budget, done())
        if n_epochs is None:
            print(*r, 'waits for the runs at equal epochs: start again when they are there', flush=True)
            continue
        rec = records.add({**train(net, method, s, seed, dsets, n_epochs), 'budget': budget})
        print(*r, rec['accuracy'], f"{rec['seconds']:.0f} s", flush=True)
    print(*[f"{net}, dense {show(accuracies(net, 'dense', 0.))}\n\n{table(net)}" for net in nets], target_table(), ablation_table(), setting(), sep='\n\n')

# ------------------------------------------------------------ what they came to
def accuracies(net, m, s, budget='epochs'): return [100*r['accuracy'] for k,r in done().items() if k[:3]==(net, m, s) and k[4]==budget]

def show(a): return f'{mean(a):.2f} ± {stdev(a):.2f}' if len(a)>1 else f'{a[0]:.2f}' if a else ''

def spread(net, s):
    "Standard deviation of a run's accuracy over seeds, in points: the median over methods"
    return median([stdev(a) for m in methods if len(a := accuracies(net, m, s))>1] or [math.inf])

def level(net, s):
    "Methods that cannot be told apart from the best of a column: less than two standard errors of a difference behind"
    runs = {m: a for m in methods if (a := accuracies(net, m, s))}
    if (sd := spread(net, s))==math.inf: return set()                         # one seed alone tells of no error
    least = max(map(mean, runs.values()), default=0) - 2*sd*(2/len(seeds))**.5
    return {m for m,a in runs.items() if mean(a)>=least}

def spent(net, m, s, budget='epochs'): return [r['flops']*r['epochs']/epochs[net] for k,r in done().items() if k[:3]==(net, m, s) and k[4]==budget]

def more(net, m, s, budget):
    "How many times what static masks cost, where equal cost would have been less than an epoch"
    if budget!='flops' or not (cost := spent(net, m, s, budget)): return ''
    ratio = mean(cost)/mean(spent(net, 'static', s))
    return f' (×{ratio:.1f})' if ratio>1.15 else ''

def table(net, only=methods, costs=True):
    "Accuracy in percent, mean and standard deviation over seeds, as Markdown; bold are the methods that cannot be told apart from the best"
    cols = [s for s in sparsities if any(accuracies(net, m, s) for m in only)]                   # those that have been run
    best,rows = {s: level(net, s) for s in cols}, []
    rows += ['| method | ' + ' | '.join(f'{s:.0%}' for s in cols) + (' | cost at 95 % |' if costs else ' |'), '|---|' + '---:|'*(len(cols)+costs)]
    for m,budget in [*product(('small dense', *only), ['epochs']), *product([m for m in denser if m in only], ['flops'] if costs else [])]:
        cells = [f'**{c}**' if m in best[s] and budget=='epochs' else c+more(net, m, s, budget) for s in cols for c in [show(accuracies(net, m, s, budget))]]
        cost = spent(net, m, .95, budget) if m!='small dense' else []
        if any(cells): rows.append(f"| {m}{', equal cost' if budget=='flops' else ''} | " + ' | '.join(cells + ([f'{mean(cost):.2f}' if cost else ''] if costs else [])) + ' |')
    return '\n'.join(rows)

to_sparse = ('GMP', 'GraNet', 'GraNet, half', 'AC/DC')
at_start  = ('static', 'SNIP', 'GraSP', 'SynFlow', 'magnitude')

def target_table():
    "The best dense-to-sparse and sparse-to-sparse methods and ours, as Markdown; the difference is over the seeds that both have, with its standard error"
    rows = ['| network | sparsity | dense, or denser, to sparse: best | sparse to sparse: best other | RigL, averaged | difference to the first | seeds |', '|---|---:|---:|---:|---:|---:|---:|']
    for net,s in product(nets, (.95, .98)):
        runs = {m: a for m in methods if (a := by_seed(net, m, s))}
        best = lambda ms: max((m for m in ms if m in runs), key=lambda m: mean(runs[m].values()), default=None)
        pruned,other,ours = best(to_sparse), best([m for m in methods if m not in (*to_sparse, *at_start, 'RigL, averaged')]), runs.get('RigL, averaged')
        if None in (pruned, other, ours): continue
        d = [ours[k]-runs[pruned][k] for k in ours if k in runs[pruned]]
        error = f' ± {stdev(d)/len(d)**.5:.2f}' if len(d)>1 else ''
        rows.append(f"| {net} | {s:.0%} | {pruned} {show(list(runs[pruned].values()))} | {other} {show(list(runs[other].values()))} | {show(list(ours.values()))} | {mean(d):+.2f}{error} | {len(d)} |")
    return '\n'.join(rows)

def ablation_table():
    "What each change costs or gains in points of accuracy, with the standard error over seeds, as Markdown"
    cases = list(product(nets, (.95, .98)))
    rows = ['| | ' + ' | '.join(f'{net}, {s:.0%}' for net,s in cases) + ' |', '|---|' + '---:|'*len(cases)]
    rows.append('| RigL, averaged | ' + ' | '.join(show(accuracies(net, 'RigL, averaged', s)) for net,s in cases) + ' |')
    for m in ablation:
        cells = []
        for net,s in cases:
            a,b = (by_seed(net, k, s) for k in (m, 'RigL, averaged'))
            d = [a[i]-b[i] for i in a if i in b]
            cells.append(f'{mean(d):+.2f} ± {stdev(d)/len(d)**.5:.2f}' if len(d)>1 else f'{d[0]:+.2f}' if d else '')
        if any(cells): rows.append(f'| {m} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(rows)

def by_seed(net, m, s): return {k[3]: 100*r['accuracy'] for k,r in done().items() if k[:3]==(net, m, s) and k[4]=='epochs'}

def setting():
    "The machine and versions of the runs, in a sentence for each machine"
    torches = defaultdict(set)
    for r in done().values(): torches[r['cpu'], r['threads'], r['python']].add(r['torch'])
    return ' '.join(f"Hardware: {cpu}, {n} thread. Versions: PyTorch {' and '.join(sorted(ts))}, Python {python}." for (cpu,n,python),ts in sorted(torches.items()))

if __name__=='__main__': main()
