"""A small language model: methods of sparse training with AdamW, in float32 and bfloat16, beside dense models.

    python benchmarks/language_model.py                 # runs what language_model.jsonl lacks, then prints the tables
    python benchmarks/language_model.py --only REGEX    # those whose name, as printed, matches
    python benchmarks/language_model.py --table         # only prints them

A decoder of three blocks (width 128, 4 heads, 590,000 weights in its linear layers) predicts the next letter of docstrings of numpy, pandas and scipy (as installed: other versions, other text), of which the
last 5 % are held out. 2,000 steps of AdamW with torch's defaults but for the learning rate: .004 (for the dense model better than .002), after a warm-up of 100 steps a cosine to a tenth. Sparse models have the same share of weights in each linear layer of the
blocks; embeddings, norms and the head stay dense. `small dense` is narrower, with as many weights in its blocks as the sparse model has active ones. In bfloat16 weights, gradients and AdamW's averages are
all bfloat16. Methods are the presets; `filled` starts new weights with the second moment of their layer (`fill_state`), times
the square of their gradient's excess where that is known, and `mean` without it.

Loss is that of the held-out letters in nats a letter, after the last step. Each run is one thread, in plain PyTorch, and masked (`storage` would not change what is learned)."""
import math, time
from statistics import mean
import torch
from sparsefast.all import *
from sparsefast.find import sparse_layers
from sparsefast.resets import fill_state
from sparsefast.presets import presets_by_name
from deploy import hardware
from newborns import Letters, batch, loss_of, text
from records import Records, run_lacking, spread, where

records = Records(__file__)
settings = dict(lr=4e-3, lr_warmup=100, total=2000, bs=16, context=64, width=128, heads=4, blocks=3)
small = {0.7: 72, 0.9: 40, 0.95: 28}                                         # widths with as many weights as are active
methods = ('static', 'SET', 'SET, filled', 'RigL', 'RigL, filled', 'RigL, mean', 'RigL, random growth', 'RigL_avg', 'RigL_avg, filled', 'CHTs', 'GMP_lm', 'GraNet')
dtypes = ('float32', 'bfloat16')
seeds = (0, 1, 2)

def mean_state(p, opt, where, born=None, dense_state=False):
    "Give new weights the mean second moment of the others, whatever their gradient"
    fill_state(p, opt, where, born=born, dense_state=dense_state)

changes = {**{f'{n}, filled': dict(reset_state_f=fill_state) for n in ('SET', 'RigL', 'RigL_avg')}, 'RigL, mean': dict(reset_state_f=mean_state), 'RigL, random growth': dict(grow_score_f=random_score)}

def method_of(name, seed, total):
    kw = changes.get(name, {})
    return DSTMethod(**{**presets_by_name()[name.split(',')[0].lower()], 'seed': seed, **kw}).in_steps(total)

def lr_at(step, lr, lr_warmup, total, **_):
    "Linear warm-up, then a cosine to a tenth"
    if step<lr_warmup: return lr*step/lr_warmup
    return lr*(.1+.9*(1+math.cos(math.pi*(step-lr_warmup)/(total-lr_warmup)))/2)

def evaluate(model, data, context, n=64, bs=64):
    "Mean loss of pieces that do not overlap"
    pieces = data[:len(data)//(context+1)*(context+1)].view(-1, context+1)
    with torch.no_grad(): losses = [loss_of(model, p[:,:-1], p[:,1:])*len(p) for p in pieces.split(bs)]
    return sum(losses).item()/len(pieces)

def train(data, name, sparsity, dtype, seed):
    "One run from start to end; returns its record"
    s,start,cut = settings,time.process_time(),int(.95*len(data))
    total,held = s['total'],data[cut:]
    torch.manual_seed(seed)
    model = Letters(small[sparsity] if name=='small dense' else s['width'], s['heads'], s['blocks'], s['context']).to(getattr(torch, dtype))
    method = None if 'dense' in name else method_of(name, seed, total)
    if method: sparsify_model(model, sparsity, exclude=['head'], **{'sparse_f': uniform_sparsity, **method.sparsify_kwargs(sparsity)})
    opt,gen = torch.optim.AdamW(model.parameters(), lr=s['lr']),torch.Generator().manual_seed(seed)
    curve,recent = [],[]
    for step in range(1, total+1):
        for g in opt.param_groups: g['lr'] = lr_at(step, **s)
        loss = loss_of(model, *batch(data[:cut], gen, s['bs'], s['context']))
        loss.backward()
        if method: method.step(model, opt, step, total=total)
        else: opt.step()
        opt.zero_grad()
        recent.append(loss.item())
        if step%100==0: curve,recent = [*curve, round(mean(recent), 4)],[]
    weights = sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, torch.nn.Linear))
    active = sum(int(l.nnz) for l in sparse_layers(model)) if method else weights
    return dict(name=run_name(name, sparsity, dtype, seed), method=name, sparsity=sparsity, dtype=dtype, seed=seed, loss=round(evaluate(model, held, s['context']), 4),
                weights=weights, active=active, curve=curve, letters=len(data), cpu_seconds=round(time.process_time()-start, 1), **settings, **hardware(1))

def run_name(name, sparsity, dtype, seed): return f'{name} {sparsity:g} {dtype} {seed}'

def plan():
    "All runs: (method, sparsity, dtype, seed), the most telling first"
    at = lambda s, names, dtype='float32', seed=0: [(n, s, dtype, seed) for n in names]
    every = ('small dense', *methods)
    leading = ('small dense', 'static', 'SET', 'RigL', 'RigL_avg', 'GMP_lm', 'GraNet')
    dense = [('dense', 0., d, seed) for seed in seeds for d in dtypes]
    return [dense[0], *at(.9, every), *dense[1:2], *at(.9, ('static', 'SET', 'RigL', 'RigL, filled', 'RigL_avg', 'GMP_lm'), 'bfloat16'), *at(.9, every, seed=1), *at(.95, leading), *at(.7, leading),
            *dense[2:3], *dense[4:5], *at(.9, every, seed=2), *at(.9, ('static', 'SET', 'RigL', 'RigL, filled'), 'bfloat16', 1), *at(.95, leading, seed=1), *at(.7, leading, seed=1)]

done = records.done

def cell(name, sparsity, dtype):
    return spread([r['loss'] for r in done().values() if (r['method'], r['sparsity'], r['dtype'])==(name, sparsity, dtype)], 3)

def table():
    "Held-out loss, mean, standard deviation and number of seeds, as Markdown"
    cols = [(s, d) for d in dtypes for s in (.7, .9, .95) if any((r['sparsity'], r['dtype'])==(s, d) for r in done().values())]
    rows = ['| | ' + ' | '.join(f'{s:.0%}, {d}' for s,d in cols) + ' |', '|---|' + '---:|'*len(cols)]
    rows.append('| dense | ' + ' | '.join(cell('dense', 0., d) for _,d in cols) + ' |')
    cells = {n: [cell(n, s, d) for s,d in cols] for n in ('small dense', *methods)}
    return '\n'.join([*rows, *(f"| {n} | {' | '.join(c)} |" for n,c in cells.items() if any(c))])

def setting():
    "The machine and versions of the runs, in one sentence"
    letters = ' and '.join(f'{n:,}' for n in sorted({r['letters'] for r in done().values()}))
    return f"{where(done().values(), 'processor')} {letters} letters of text."

if __name__=='__main__': run_lacking(__doc__, records, plan, run_name, text, train, table, 'loss')
