"""The optimizer's state of new weights: what a whole run ends with, by the second moment that new weights start from.

    python benchmarks/newborn_state.py                 # runs what newborn_state.jsonl lacks, then prints the tables
    python benchmarks/newborn_state.py --only REGEX    # those whose name, as printed, matches
    python benchmarks/newborn_state.py --table         # only prints them

The small convolutional network of `methods.py` (155,536 weights) on Fashion-MNIST, 95 % sparse by ERK, batches of 128, in plain PyTorch on one thread. The learning rate rises over
100 steps and falls by a cosine to zero; it is .003 for all optimizers (.001 for RMSprop). Presets are those of the library, their intervals scaled to the length of the run.

`zeroed` starts the state of a new weight at zero. `filled` starts its second moment at the mean of the weights that stay, times the square of its own gradient's excess where that is
known; `tenth` and `quarter` start it at that share of the mean, whatever its gradient. Accuracy is that of the last step on the 10,000 test images, in percent."""
import time
from functools import partial
import fastai.optimizer as fo
import torch
from torch import optim
from torch.nn import functional as F
from sparsefast.all import *
from sparsefast.presets import presets_by_name
from sparsefast.resets import fill_state, second_moments, zero_state
from methods import data, lr_at, nets
from records import Records, hardware, run_lacking, spread, where

records = Records(__file__)
settings = dict(net='convnet', sparsity=0.95, bs=128, lr_warmup=100)
opts = dict(AdamW=(optim.AdamW, 3e-3), NAdam=(optim.NAdam, 3e-3), RMSprop=(optim.RMSprop, 1e-3), fastai=(fo.Adam, 3e-3))

@torch.no_grad()
def share_of_mean(p, opt, where, born=None, dense_state=False, share=1.):
    "Start second moments at a share of the mean of the weights that stay"
    fill_state(p, opt, where, born=born, dense_state=dense_state)
    if born is None or dense_state: return
    for v in second_moments(p, opt).values(): v.copy_(torch.where(born, share*v, v))

rules = dict(zeroed=zero_state, tenth=partial(share_of_mean, share=.1), quarter=partial(share_of_mean, share=.25), filled=fill_state)

def train(images, preset, opt, rule, steps, seed):
    "One run from start to end; returns its record"
    (x,y),(xt,yt) = images
    s,start,step = settings,time.process_time(),0
    make,lr = opts[opt]
    per_epoch = len(x)//s['bs']
    torch.manual_seed(seed)
    model = nets[s['net']]().to(memory_format=torch.channels_last)
    m = DSTMethod(**{**presets_by_name()[preset], 'seed': seed, 'reset_state_f': rules[rule]}).in_steps(steps, per_epoch)
    sparsify_model(model, s['sparsity'], sparse_f=erdos_renyi_sparsity)
    o,gen = make(list(model.parameters()), lr=lr),torch.Generator().manual_seed(seed)
    while step<steps:
        for i in torch.randperm(len(x), generator=gen)[:per_epoch*s['bs']].view(per_epoch, -1)[:steps-step]:
            step += 1
            now = lr_at(step, steps, s['lr_warmup'], lr)
            if opt=='fastai': o.set_hyper('lr', now)
            else: o.param_groups[0]['lr'] = now
            F.cross_entropy(model(x[i].contiguous(memory_format=torch.channels_last)), y[i]).backward()
            m.step(model, o, step, total=steps)
            o.zero_grad()
    model.eval()
    with torch.no_grad(): right = torch.cat([model(b) for b in xt.split(1000)]).argmax(1)==yt
    return dict(name=run_name(preset, opt, rule, steps, seed), preset=preset, opt=opt, rule=rule, steps=steps, seed=seed, lr=lr,
                accuracy=round(100*right.float().mean().item(), 2), cpu_seconds=round(time.process_time()-start, 1), **settings, **hardware())

def run_name(preset, opt, rule, steps, seed): return f'{preset} {opt} {rule} {steps} {seed}'

def plan():
    "All runs, the most telling first"
    short = [(p, 'AdamW', r, 1000, seed) for seed in (0, 1, 2) for p in ('set', 'rigl', 'rigl_avg') for r in rules]
    others = [('rigl_avg', o, r, 1000, seed) for seed in (0, 1) for o in opts if o!='AdamW' for r in rules]
    long = [(p, 'AdamW', r, 5000, 0) for p in ('set', 'rigl_avg') for r in rules]
    return [*short, *others, *long]

done = records.done

def cell(preset, opt, rule, steps):
    return spread([r['accuracy'] for r in done().values() if (r['preset'], r['opt'], r['rule'], r['steps'])==(preset, opt, rule, steps)])

def table():
    "Accuracy, mean, standard deviation and number of seeds, as Markdown"
    cols = list(dict.fromkeys(r[:2]+r[3:4] for r in plan()))
    lines = ['| preset, optimizer, steps | ' + ' | '.join(rules) + ' |', '|---|' + '---:|'*len(rules)]
    for preset,opt,steps in cols:
        cells = [cell(preset, opt, r, steps) for r in rules]
        if any(cells): lines.append(f"| {preset}, {'fastai Adam' if opt=='fastai' else opt}, {steps:,} | {' | '.join(cells)} |")
    return '\n'.join(lines)

def setting(): return where(done().values())

if __name__=='__main__': run_lacking(__doc__, records, plan, run_name, data, train, table, 'accuracy')
