"""New weights and AdamW: the training loss around updates, with the state of new weights zeroed and with their second moment filled.

    python benchmarks/newborns.py            # runs what newborns.jsonl lacks, then prints the table
    python benchmarks/newborns.py --only REGEX  # those whose name, as printed, matches
    python benchmarks/newborns.py --table    # only prints it

A transformer predicts the next letter of docstrings of numpy, pandas and scipy (as installed: other versions, other text). RigL at 90 % sparsity in plain PyTorch on one thread, AdamW
with torch's defaults but for the learning rate, which rises over the first 100 steps and then stays. Runs of one seed share initial weights, masks and batches, and differ in the rule only.
`zeroed` is `zero_state`, `filled` is `reset_state`, the default; `warmed` is `zeroed` with a learning rate that rises after each update; `static` never updates its masks.

A row has `around`: the mean over the updates from step 400 on of the loss at -10 to 40 steps from an update, less the mean loss of the 10 steps before it (`static`: at the same
steps). `change` is the mean of its first 20 steps after the update. `peak` is the largest single loss after an update over the mean of the 10 before it. `final` is the loss on text not trained on."""
import argparse, importlib.util, json, platform, random, re, time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
import torch
from torch import nn
from torch.nn import functional as F
from sparsefast.all import *
from sparsefast.optim import reset_state, zero_state

out = Path(__file__).with_suffix('.jsonl')
libs,seeds = ('numpy', 'pandas', 'scipy'), (0, 1, 2)
rules = dict(zeroed=zero_state, filled=reset_state, warmed=zero_state, static=None)
settings = dict(sparsity=0.9, lr=5e-3, lr_warmup=100, steps=2000, every=100, warm=20, bs=16, context=32, width=64, heads=4, blocks=2, first=400)
n_before,n_after = 10, 40

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

def run(data, rule, seed, sparsity, lr, lr_warmup, steps, every, warm, bs, context, width, heads, blocks, first):
    "The losses of all training batches, the steps of the updates, and the loss on held-out text"
    torch.manual_seed(seed)
    model = Letters(width, heads, blocks, context)
    sparsify_model(model, sparsity, exclude=['head'])
    method = RigL(update_every=every, reset_state_f=rules[rule] or reset_state, seed=seed)
    if rule=='static': method = DSTMethod(**Static_presets)
    opt = torch.optim.AdamW(model.parameters(), lr=lr)
    train,valid = data[:-len(data)//10],data[-len(data)//10:]
    gen,losses,updates = torch.Generator().manual_seed(seed),[],[s for s in range(every, steps, every) if s<0.75*steps]
    for step in range(1, steps+1):
        rise = min(1, step/lr_warmup)
        if rule=='warmed': rise *= min(1, (step-max([u for u in updates if u<step], default=-warm))/warm)
        for g in opt.param_groups: g['lr'] = lr*rise
        loss = loss_of(model, *batch(train, gen, bs, context))
        opt.zero_grad()
        loss.backward()
        method.step(model, opt, step, total=steps)
        losses.append(loss.item())
    model.eval()
    with torch.no_grad(): final = mean(loss_of(model, *batch(valid, gen, 256, context)).item() for _ in range(8))
    return losses, updates, final

def around(losses, updates):
    "Mean losses near an update, relative to those just before it; place 0 is the update's own batch"
    near = [[l-mean(losses[u-1-n_before:u-1]) for l in losses[u-1-n_before:u+n_after]] for u in updates]
    return [mean(ls) for ls in zip(*near)], max(max(ls[n_before+1:]) for ls in near)

def measure(data, rule, seed):
    start = time.perf_counter()
    losses,updates,final = run(data, rule, seed, **settings)
    near,peak = around(losses, [u for u in updates if u>=settings['first']])
    r3 = lambda x: round(x, 4)
    return dict(name=f'{rule} {seed}', rule=rule, seed=seed, change=r3(mean(near[n_before+1:n_before+21])), peak=r3(peak), final=r3(final), around=[r3(x) for x in near],
                seconds=round(time.perf_counter()-start, 1), letters=len(data), **settings, threads=torch.get_num_threads(), cpu=platform.processor() or platform.machine(),
                python=platform.python_version(), **{lib: version(lib) for lib in ('torch', *libs)})

def done(): return {r['name']: r for r in map(json.loads, out.read_text().splitlines())} if out.exists() else {}

def table():
    "Mean and standard deviation over the seeds"
    rows = ['| state of new weights | change over 20 steps | largest rise of one batch | loss in the end | seeds |', '|---|---:|---:|---:|---:|']
    for rule in rules:
        rs = [r for r in done().values() if r['rule']==rule]
        if not rs: continue
        cells = [f"{mean(v):+.3f} ± {stdev(v):.3f}" if len(v := [r[k] for r in rs])>1 else f'{v[0]:+.3f}' for k in ('change', 'peak', 'final')]
        rows.append(f"| {rule} | {' | '.join(cells)} | {len(rs)} |")
    return '\n'.join(rows)

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='')
    parser.add_argument('--table', action='store_true')
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = None if args.table else text()
    for seed in seeds:
        for rule in rules:
            if args.table or f'{rule} {seed}' in done() or not re.search(args.only, f'{rule} {seed}'): continue
            with out.open('a') as f: f.write(json.dumps(measure(data, rule, seed))+'\n')
    print(table())
