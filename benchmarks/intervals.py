"""Update intervals and spans of presets, in trainings of 200 to 20,000 steps on Fashion-MNIST (committed so far: 200 and 500).

    python benchmarks/intervals.py            # runs what intervals.jsonl lacks, then prints the tables
    python benchmarks/intervals.py --table    # only prints them

The convolutional network of `methods.py` (151,488 weights) at 98 % sparsity by ERK, with its recipe: SGD, batches of 128, a warm-up of a quarter of training and at most an epoch, then a cosine to zero.
An interval is a number of optimizer steps, or below 1 a share of training (of less than one step: one step); `None` is once an epoch, 468 steps. `published` marks the interval and span of the paper or
its code; where that is longer than the training, no update falls into it, so GraNet's row is that of a dense network and the others' that of static masks. Each run is one thread, plain PyTorch and `DSTMethod.step`; runs are independent, and `--only REGEX` picks those whose name, as printed, matches. Accuracy is that on the 10,000 test images
after the last step, in [0,1]. `density` is the mean share of active weights over all steps, and `updates` counts those that fell into the training."""
import time, warnings
from itertools import product
from statistics import mean, stdev
import torch
from torch.nn import functional as F
from methods import data, lr_at, nets, recipe
from records import Records, hardware, parser, words
from sparsefast import presets
from sparsefast.all import *

sparsity,lengths = 0.98,(200, 500, 2000, 20_000)

# ------------------------------------------------------------ preset -> settings to compare: (interval, span of the schedule of sparsity), those of the paper first
gmp,granet,paper = (10/32, 25/32),(0., .3),None
candidates = dict(
    GMP       = [(100, gmp), (1/100, gmp), (1/100, (0., .75)), (1/100, (.1, .7)), (1/100, (.25, .75)), (1/500, (.1, .7)), (1/500, gmp), (1/25, (.1, .7)),
                 (1/500, (0., .75)), (1/100, (0., 1.)), (1/25, (0., .75))],
    GraNet    = [(1000, granet), (1/100, granet), (1/50, granet), (1/25, granet), (1/50, (0., .5)), (1/50, (.1, .7)), (1/50, (0., .75))],
    RigL      = [(100, paper), (1/100, paper), (1/50, paper), (1/25, paper), (1/12, paper)],
    SET       = [(None, paper), (1/100, paper), (1/50, paper), (1/25, paper), (1/12, paper)],
    SNFS      = [(None, paper), (1/100, paper), (1/50, paper), (1/25, paper), (1/12, paper)],
    RigL_ITOP = [(4000, paper), (1/25, paper), (1/12, paper)],
    SET_ITOP  = [(1500, paper), (1/50, paper), (1/25, paper)],
    MEST      = [(None, paper), (1/100, paper), (1/32, paper), (1/12, paper)],
    DSR       = [(100, paper), (1/100, paper), (1/50, paper), (1/25, paper)],
    SRigL     = [(100, paper), (1/25, paper), (1/12, paper)],
    TopKAST   = [(1, paper), (1/100, paper)],
    ACDC      = [(1/100, paper), (1/25, paper)])
# those that a choice hangs on
telling = dict(GMP=[(100, gmp), (1/100, gmp), (1/100, (0., .75))], GraNet=[(1000, granet), (1/50, granet), (1/50, (0., .75))], RigL=[(100, paper), (1/25, paper), (1/12, paper)],
               SET=[(None, paper), (1/50, paper)], SNFS=[(None, paper), (1/50, paper)], RigL_ITOP=[(4000, paper), (1/25, paper), (1/12, paper)], SET_ITOP=[(1500, paper), (1/50, paper)],
               MEST=[(None, paper), (1/32, paper)], DSR=[(100, paper), (1/50, paper)], SRigL=[(100, paper), (1/12, paper)])
leading = dict(GMP=telling['GMP'], GraNet=[*telling['GraNet'][1:], (1/50, (0., .5))], RigL=[(100, paper), (1/12, paper)], SET=telling['SET'])

def named(name, every, span):
    "Show a setting"
    every = f'1/{round(1/every)}' if every and every<1 else 'epoch' if every is None else f'{every} steps'
    return f'{name} {every}' + (f' {span[0]:.3g}-{span[1]:.3g}' if span else '')

def method_of(name, every, span, total, per_epoch, seed):
    "Make the method of a run, with its interval in steps"
    kw = dict(batches_per_update=every, seed=seed, **(dict(sparsity_span=span) if span else {}))
    return DSTMethod(**{**getattr(presets, f'{name}_presets'), **kw}).in_steps(total, per_epoch)

def train(name, every, span, total, seed, dsets):
    "One run from start to end; returns its record"
    (x,y),(xt,yt) = dsets
    start,bs = time.perf_counter(),recipe['bs']
    n_iter,warm = len(x)//bs, min(total/4, len(x)//bs)
    torch.manual_seed(seed)
    model = nets['convnet']().to(memory_format=torch.channels_last)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                      # intervals too long or too short are what is measured
        dst = method_of(name, every, span, total, n_iter, seed)
        sparsify_model(model, sparsity, **{'sparse_f': erdos_renyi_sparsity, **dst.sparsify_kwargs(sparsity)})
        opt = torch.optim.SGD(model.parameters(), lr=0., momentum=recipe['momentum'], weight_decay=recipe['weight_decay'])
        batches,step,active,updates,size = torch.Generator().manual_seed(seed), 0, 0, 0, sum(m.numel() for _,m,_ in sparse_params(model))
        while step<total:
            for idx in torch.randperm(len(x), generator=batches)[:n_iter*bs].view(n_iter, bs)[:total-step]:
                step += 1
                for g in opt.param_groups: g['lr'] = lr_at(step, total, warm, recipe['lr'])
                active += sum(int(m.sum()) for _,m,_ in sparse_params(model))
                updates += dst.due(step, total=total)
                F.cross_entropy(model(x[idx].contiguous(memory_format=torch.channels_last)), y[idx]).backward()
                dst.step(model, opt, step, total=total)
                opt.zero_grad()
    model.eval()
    with torch.no_grad(): acc = (torch.cat([model(b) for b in xt.split(1000)]).argmax(1)==yt).float().mean().item()
    return dict(preset=name, every=every, span=span, steps=total, seed=seed, accuracy=round(acc, 4), updates=updates, density=round(active/size/total, 4),
                active=sum(int(m.sum()) for _,m,_ in sparse_params(model)), sparsity=sparsity, seconds=round(time.perf_counter()-start, 1), **hardware())

# ------------------------------------------------------------ all runs
def key(r): return named(r['preset'], r['every'], r['span'] and tuple(r['span'])), r['steps'], r['seed']

records = Records(__file__, key)
done = records.done

def plan():
    "All runs: (preset, interval, span, steps, seed), the most telling first"
    order = [(leading, 500, 0), (leading, 200, 0), (leading, 500, 1), (leading, 200, 1), (leading, 2000, 0), (telling, 200, 0), (leading, 500, 2), (leading, 200, 2),
             (telling, 500, 1), (candidates, 500, 0), (candidates, 200, 0), (telling, 2000, 0), ({k: candidates[k] for k in ('RigL', 'GMP')}, 20_000, 0)]
    seen = set()
    for settings,total,seed in order:
        for name in settings:
            for every,span in settings[name]:
                if (r := (name, every, span, total, seed)) not in seen: yield r
                seen.add(r)

def cell(name, total):
    "Accuracy in percent, its mean and, of several seeds, standard deviation"
    a = [100*r['accuracy'] for (n,t,_),r in done().items() if (n,t)==(name, total)]
    return f'{mean(a):.2f} ± {stdev(a):.2f} ({len(a)})' if len(a)>1 else f'{a[0]:.2f}' if a else ''

def table():
    "Accuracy in percent of each setting at each length, as Markdown"
    rows = ['| setting | ' + ' | '.join(f'{t:,} steps' for t in lengths) + ' |', '|---|' + '---:|'*len(lengths)]
    for name,settings in candidates.items():
        for i,(every,span) in enumerate(settings):
            label = named(name, every, span)
            rows.append(f"| {label}{'' if i else ', published'} | " + ' | '.join(cell(label, t) for t in lengths) + ' |')
    return '\n'.join(rows)

def main():
    args = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    dsets = None if args.table else data()
    runs = {(named(*r[:3]), *r[3:]): r for r in plan()}
    for k in [] if args.table else records.lacking(runs, words, args.only):
        r = runs[k]
        rec = records.add({**train(*r, dsets), 'published': r[1:3]==candidates[r[0]][0]})
        print(*k, rec['accuracy'], rec['density'], f"{rec['seconds']:.0f} s", flush=True)
    print(table())

if __name__=='__main__': main()
