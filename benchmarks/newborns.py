"""New weights and AdamW: the training loss after an update, with the state of new weights zeroed and with their second moment filled.

    python benchmarks/newborns.py               # runs what newborns.jsonl lacks, then prints the table
    python benchmarks/newborns.py --only REGEX  # those whose name, as printed, matches
    python benchmarks/newborns.py --table       # only prints it

A transformer predicts the next letter of docstrings of numpy, pandas and scipy (as installed: other versions, other text). RigL at 90 % sparsity in plain PyTorch on one thread, AdamW
with torch's defaults but for the learning rate, which rises over the first 100 steps and then stays. Before each update the training branches: all branches start from the same weights
and state, and see the same batches. `filled` updates by `fill_state`, and goes on; `zeroed` updates by `zero_state`, the default; `static` leaves out the update, and the step
whose place it takes.

A row is a seed. Its `around` has for each branch the mean over the updates of the loss of -10 to 40 steps from an update, less the mean loss of the 10 steps before it. `change` is
the mean of its first 20 steps after the update, and `moved` the mean absolute value of the new weights after them, in learning rates."""
import copy, importlib.util, random, re, time
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
import torch
from torch import nn
from torch.nn import functional as F
from sparsefast.all import *
from sparsefast.resets import fill_state, zero_state
from records import Records, hardware, parser

records = Records(__file__)
libs,seeds = ('numpy', 'pandas', 'scipy'), (0, 1, 2)
branches = dict(filled=fill_state, zeroed=zero_state, static=None)
settings = dict(sparsity=0.9, lr=5e-3, lr_warmup=100, total=1600, every=100, first=300, bs=16, context=32, width=64, heads=4, blocks=2)
n_before,n_after,n_mean = 10, 40, 20

def text():
    "Prose paragraphs of docstrings, in 27 letters, as numbers"
    found = {}
    for lib in libs:
        root = Path(importlib.util.find_spec(lib).origin).parent
        for f in sorted(root.rglob('*.py')):
            if 'test' in f.relative_to(root).as_posix(): continue
            for doc in re.findall(r'"""(.*?)"""', f.read_text(encoding='utf-8', errors='ignore'), flags=re.S):
                for par in re.split(r'\n\s*\n', doc):
                    words = re.findall('[a-z]+', par.lower())
                    if 15<=len(words)<=80 and not re.search(r'>>>|::|--|==|^\s*\.\.', par): found[' '.join(words)] = None
    pars = list(found)
    random.Random(0).shuffle(pars)
    return torch.tensor([0 if c==' ' else ord(c)-96 for c in ' '.join(pars)])

class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads,self.n1,self.n2 = heads,nn.LayerNorm(d),nn.LayerNorm(d)
        self.qkv,self.proj = nn.Linear(d, 3*d),nn.Linear(d, d)
        self.up,self.down = nn.Linear(d, 4*d),nn.Linear(4*d, d)
    def forward(self, x):
        q,k,v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.n1(x)).chunk(3, -1))
        x = x+self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x+self.down(F.gelu(self.up(self.n2(x))))

class Letters(nn.Module):
    "Predicts each next letter"
    def __init__(self, d, heads, blocks, context):
        super().__init__()
        self.emb,self.pos = nn.Embedding(27, d),nn.Parameter(0.02*torch.randn(context, d))
        self.blocks = nn.Sequential(*[Block(d, heads) for _ in range(blocks)])
        self.norm,self.head = nn.LayerNorm(d),nn.Linear(d, 27)
    def forward(self, x): return self.head(self.norm(self.blocks(self.emb(x)+self.pos)))

def batch(data, gen, bs, context):
    at = torch.randint(len(data)-context-1, (bs,), generator=gen)
    both = torch.stack([data[i:i+context+1] for i in at.tolist()])
    return both[:,:-1], both[:,1:]

def loss_of(model, x, y): return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

def train(model, opt, method, batches, start, end, lr, lr_warmup, total):
    "Take the steps from `start` to before `end`, and return the losses of their batches"
    losses = []
    for step in range(start, end):
        for g in opt.param_groups: g['lr'] = lr*min(1, step/lr_warmup)
        loss = loss_of(model, *batches[step-1])
        opt.zero_grad()
        loss.backward()
        if method: method.step(model, opt, step, total=total)
        losses.append(loss.item())
    return losses

def after_update(model, opt, rule, batches, step, **kw):
    "The losses of the update's batch and those after it, and how far new weights have moved, in learning rates"
    (model,opt),old = copy.deepcopy((model, opt)),[mask.clone() for *_,mask in masked_params(model)]
    method = RigL(update_every=settings['every'], reset_state_f=branches[rule]) if branches[rule] else DSTMethod(**{**Static_presets, 'batches_per_update': step})
    losses = train(model, opt, method if branches[rule] else None, batches, step, step+1, **kw)
    if branches[rule] is None: method.enforce(model, opt)
    losses += train(model, opt, method, batches, step+1, step+1+n_mean, **kw)
    new = torch.cat([p.detach()[mask & ~was].abs() for (_,_,p,mask),was in zip(masked_params(model), old)])
    losses += train(model, opt, method, batches, step+1+n_mean, step+1+n_after, **kw)
    return losses, new.mean().item()/kw['lr'] if len(new) else 0.

def run(data, seed, sparsity, every, first, bs, context, width, heads, blocks, **kw):
    "For each branch the losses near each update, and how far new weights have moved"
    torch.manual_seed(seed)
    model = Letters(width, heads, blocks, context)
    sparsify_model(model, sparsity, exclude=['head'])
    method,opt = RigL(update_every=every),torch.optim.AdamW(model.parameters(), lr=kw['lr'])
    updates = [u for u in range(first, kw['total'], every) if method.due(u, total=kw['total'])]
    gen,losses,found = torch.Generator().manual_seed(seed),[],{b: [] for b in branches}
    batches = [batch(data, gen, bs, context) for _ in range(updates[-1]+n_after)]
    for u in updates:
        losses += train(model, opt, method, batches, len(losses)+1, u, **kw)
        before = losses[-n_before:]
        for b in branches:
            after,moved = after_update(model, opt, b, batches, u, **kw)
            found[b].append(([l-mean(before) for l in before+after], moved))
    return found

def measure(data, seed):
    start,row = time.process_time(),dict(name=f'seed {seed}', seed=seed, around={}, change={}, moved={})
    for b,near in run(data, seed, **settings).items():
        row['around'][b] = [round(mean(ls), 4) for ls in zip(*(ls for ls,_ in near))]
        row['change'][b] = round(mean(row['around'][b][n_before+1:n_before+1+n_mean]), 4)
        row['moved'][b] = round(mean(moved for _,moved in near), 3)
        row['updates'] = len(near)
    return dict(**row, cpu_seconds=round(time.process_time()-start, 1), letters=len(data), **settings, **hardware(), **{lib: version(lib) for lib in libs})

done = records.done

def table():
    "Mean and standard deviation over the seeds"
    rs,rows = done().values(),['| state of new weights | change of the loss over 20 steps | new weights after 20 steps, in learning rates |', '|---|---:|---:|']
    spread = lambda v: f'{mean(v):+.4f} ± {stdev(v):.4f}'
    if len(rs)<2: return ''
    for b in branches: rows.append(f"| {b} | {spread([r['change'][b] for r in rs])} | {mean(r['moved'][b] for r in rs):.2f} |")
    return '\n'.join([*rows, f"| zeroed - filled | {spread([r['change']['zeroed']-r['change']['filled'] for r in rs])} | |"])

if __name__=='__main__':
    args = parser(__doc__, 'seeds').parse_args()
    torch.set_num_threads(1)
    data = None if args.table else text()
    for seed, in [] if args.table else records.lacking(zip(seeds), 'seed {}'.format, args.only): records.add(measure(data, seed))
    print(table())
