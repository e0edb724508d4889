"""Fashion-MNIST at 99 % sparsity: the multilayer perceptron of the CHTs paper, with the published numbers beside ours.

    python benchmarks/mlp.py                 # runs what mlp.jsonl lacks, then prints the table
    python benchmarks/mlp.py --only REGEX    # those whose name, as printed, matches
    python benchmarks/mlp.py --table         # only prints it
    python benchmarks/mlp.py --speed         # appends the time of a step, compressed and masked against dense, side by side

Zhang et al. 2025, arXiv 2501.19107: 784-1568-1568-1568-10, the last layer dense, all others 99 % sparse; 100 epochs of batches of 32, SGD with momentum .9 and weight decay 5e-4, a learning rate that
falls linearly from .025 to 2.5e-4, initial weights from N(0, 2 / (density x outputs)), updates once an epoch that exchange 30 % of the active weights. Methods keep what else belongs to them, as in
the presets; RigL_avg averages the gradients of the last 500 steps before an update. Not as published: masks start at random, where theirs start from correlations of inputs (CSTI); updates end where a preset ends them.

Each run is one thread. Methods without a dense phase train on compressed layers (`storage` of a row), the others on masked ones. Accuracy is that on the 10,000 test images: `accuracy` after the last epoch,
`best` the highest of any epoch, which looks at the test set to choose."""
import time, warnings
from statistics import mean, stdev
import torch
from torch import nn
from torch.nn import functional as F
from sparsefast.all import *
from sparsefast.find import sparse_layers
from sparsefast.presets import presets_by_name
from sparsefast.ship.timing import paired_times, ratio
from deploy import hardware
from records import Records, parser, where
from fashion_mnist import data

records = Records(__file__)
sparsity,seeds,hidden = 0.99, (0, 1, 2), 1568
epochs,batch,first_lr,last_lr = 100, 32, .025, 2.5e-4
compressed = ('static', 'SET', 'RigL', 'CHTs', 'GSE', 'RigL_avg')
masked = ('CHTss', 'GMP', 'GraNet', 'TopKAST')
published = dict(dense=90.88, SET=89.00, RigL=89.91, CHTs=90.93, GMP=90.29, GraNet=89.98, CHTss=90.81)

def net(seed, density=1.):
    torch.manual_seed(seed)
    linear = [nn.Linear(i, o) for i,o in ((784, hidden), (hidden, hidden), (hidden, hidden), (hidden, 10))]
    for l in linear: nn.init.normal_(l.weight, std=(2/(l.out_features*(density if l is not linear[-1] else 1.)))**.5)
    return nn.Sequential(nn.Flatten(), *[m for l in linear[:-1] for m in (l, nn.ReLU())], linear[-1])

def method_of(name, seed, total, per_epoch):
    "The method of a run, with its interval in steps"
    kw = dict(batches_per_update=None, initial_drop_grow_pct=.3) if name in ('SET', 'RigL', 'CHTs', 'CHTss', 'GSE', 'GraNet') else dict(grad_steps=500) if name=='RigL_avg' else {}
    return DSTMethod(**{**presets_by_name()[name.lower()], 'seed': seed, **kw}).in_steps(total, per_epoch)

def model_of(name, seed, total=1, per_epoch=1):
    "A model, its optimizer and its method (dense: `None`)"
    model = net(seed, 1. if name=='dense' else 1-sparsity)
    method = None if name=='dense' else method_of(name, seed, total, per_epoch)
    if method: sparsify_model(model, sparsity, exclude=['7'], **{'sparse_f': uniform_sparsity, **method.sparsify_kwargs(sparsity)})
    opt = torch.optim.SGD(model.parameters(), lr=first_lr, momentum=.9, weight_decay=5e-4)
    if name in compressed: to_sparse_layers(model, opt)
    return model, opt, method

def train(name, seed, dsets):
    "One run from start to end; returns its record"
    (x,y),(xt,yt) = dsets
    n_iter = len(x)//batch
    total,step,accs,start = n_iter*epochs, 0, [], time.process_time()
    model,opt,method = model_of(name, seed, total, n_iter)
    batches = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        for i in torch.randperm(len(x), generator=batches)[:n_iter*batch].view(n_iter, batch):
            step += 1
            for g in opt.param_groups: g['lr'] = first_lr+(last_lr-first_lr)*(step-1)/total
            F.cross_entropy(model(x[i]), y[i]).backward()
            if method: method.step(model, opt, step, total=total)
            else: opt.step()
            opt.zero_grad()
        model.eval()
        with torch.no_grad(): accs.append((torch.cat([model(b) for b in xt.split(1000)]).argmax(1)==yt).float().mean().item())
        if epoch%10==9: print(name, seed, epoch+1, round(accs[-1], 4), f'{time.process_time()-start:.0f} s', flush=True)
    active = sum(int(l.nnz) for l in sparse_layers(model)) if method else None
    return dict(name=f'{name} {seed}', method=name, seed=seed, accuracy=round(accs[-1], 4), best=round(max(accs), 4), active=active, storage='compressed' if name in compressed else 'masked' if method else 'dense',
                epochs=epochs, cpu_seconds=round(time.process_time()-start), **hardware(1))

done = records.done

def plan():
    "All runs: (method, seed), the quick ones first"
    return [*((m, s) for s in seeds for m in compressed), ('dense', 0), *((m, 0) for m in masked), *((m, s) for s in seeds[1:] for m in ('dense', *masked))]

def table():
    "Accuracy in percent, mean and standard deviation over seeds, as Markdown"
    rows = ['| method | layers | seeds | last epoch | best epoch | published |', '|---|---|---:|---:|---:|---:|']
    spread = lambda v: f'{mean(v):.2f} ± {stdev(v):.2f}' if len(v)>1 else f'{v[0]:.2f}'
    for m in ('dense', *compressed, *masked):
        rs = [r for r in done().values() if r.get('method')==m]
        if rs: rows.append(f"| {m} | {rs[0]['storage']} | {len(rs)} | {spread([100*r['accuracy'] for r in rs])} | {spread([100*r['best'] for r in rs])} | {published.get(m, '')} |")
    return '\n'.join(rows)

def setting():
    "The speed of a step, and the machine and versions of the runs"
    fast = done().get('speed')
    said = fast and f"A step takes 1/{fast['compressed'][0]:.1f} of the dense time on compressed layers, and {1/fast['masked'][0]:.2f} of it on masked ones (batch of 32, static masks, side by side). "
    return (said or '')+where(done().values(), 'processor')

def speed(dsets):
    "Time steps of the dense, the masked and the compressed model, in turns"
    (x,y),_ = dsets
    def step_of(model, opt, method):
        n = iter(range(1, 10**6))
        def step():
            with torch.enable_grad(): F.cross_entropy(model(x[:batch]), y[:batch]).backward()
            if method: method.step(model, opt, next(n), total=10**6)
            else: opt.step()
            opt.zero_grad()
        return step
    made = {n: model_of(m, 0) for n,m in (('dense', 'dense'), ('compressed', 'static'))}
    model,opt,method = model_of('dense', 0)
    sparsify_model(model, sparsity, exclude=['7'])
    made['masked'] = model, opt, Static()
    times = paired_times({n: step_of(*m) for n,m in made.items()}, seconds=20)
    return dict(name='speed', **{n: [round(r, 3) for r in ratio(times, 'dense', n)] for n in made}, **hardware(1))

if __name__=='__main__':
    ap = parser(__doc__)
    ap.add_argument('--speed', action='store_true', help='measure the time of a step')
    args = ap.parse_args()
    torch.set_num_threads(1)
    dsets = None if args.table else data()
    if args.speed: records.add(speed(dsets))
    elif not args.table:
        for run in records.lacking(plan(), '{} {}'.format, args.only): print(records.add(train(*run, dsets)), flush=True)
    print(table())
