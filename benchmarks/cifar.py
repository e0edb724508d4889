"""CIFAR-10 and WRN-22-2, as in RigL's paper: one command, with the published numbers beside ours.

    python benchmarks/cifar.py FOLDER                     # runs what cifar.jsonl lacks, then prints the table
    python benchmarks/cifar.py FOLDER --only 'RigL 0.9'   # those whose name matches this regular expression
    python benchmarks/cifar.py --random --steps 20        # random images of the same shape: shows that it runs, keeps nothing
    python benchmarks/cifar.py --table                    # only prints the table

FOLDER is that of `torchvision.datasets.CIFAR10`, which downloads nothing here. Evci et al. 2020, arXiv 1911.11134, section 4.2: 97,656 steps of batches of 128 (250 epochs), SGD with Nesterov momentum .9 and weight
decay 5e-4, a learning rate of .1 divided by 5 every 30,000 steps, ERK; RigL and SET replace 30 % every 100 steps, on a cosine that ends at step 75,000. Images are shifted by up to four pixels and mirrored.
A run takes some two hours on one GPU of 2017. Published numbers are those of the paper's figure as the reproduction report reads them off (Sundar and Dwaraknath 2021, arXiv 2103.15767), and the report's own.

No row is committed: the images cannot be had where this library is developed."""
import time
import torch
from torch import nn
from torch.nn import functional as F
from sparsefast.all import *
from records import Records, hardware, parser, spread

records = Records(__file__)
sparsities,seeds = (0.8, 0.9, 0.95), (0, 1, 2)
batch,total,lr,drop_every,last_update = 128, 97_656, .1, 30_000, 75_000
# accuracy in percent at 80, 90 and 95 %; dense at 0
published = {'dense': {0.: 94.1}, 'static': {.8: 92.9, .9: 91.5, .95: 89.0}, 'RigL': {.8: 93.6, .9: 92.9, .95: 91.8}, 'GMP': {.8: 93.5, .9: 93.3}}
reproduced = {'dense': {0.: 94.6}, 'static': {.8: 93.2, .9: 91.6}, 'RigL': {.8: 93.8, .9: 93.2}, 'GMP': {.8: 93.6, .9: 93.2}}
methods = ('static', 'SET', 'RigL', 'GMP', 'RigL_avg')

class Block(nn.Module):
    "Norm, ReLU and 3x3 convolution, twice, beside a shortcut"
    def __init__(self, n_in, n_out, stride):
        super().__init__()
        self.bn1,self.conv1 = nn.BatchNorm2d(n_in),nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn2,self.conv2 = nn.BatchNorm2d(n_out),nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.short = nn.Identity() if n_in==n_out else nn.Conv2d(n_in, n_out, 1, stride, bias=False)
    def forward(self, x):
        y = F.relu(self.bn1(x))
        short = x if isinstance(self.short, nn.Identity) else self.short(y)
        return self.conv2(F.relu(self.bn2(self.conv1(y))))+short

def wide_resnet(depth=22, width=2):
    n,sizes = (depth-4)//6, (16, 16*width, 32*width, 64*width)
    blocks = [Block(sizes[i] if j==0 else sizes[i+1], sizes[i+1], 2 if i and j==0 else 1) for i in range(3) for j in range(n)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), *blocks, nn.BatchNorm2d(sizes[-1]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], 10))

def data(folder, device):
    "Normalised images and labels: (train, test)"
    if folder is None:
        gen = torch.Generator().manual_seed(0)
        return [(torch.randn(n, 3, 32, 32, generator=gen).to(device), torch.randint(10, (n,), generator=gen).to(device)) for n in (2000, 1000)]
    from torchvision.datasets import CIFAR10
    sets = [CIFAR10(folder, train=train) for train in (True, False)]
    m,s = (torch.tensor(v).view(1, 3, 1, 1) for v in ((.4914, .4822, .4465), (.2470, .2435, .2616)))
    return [(((torch.tensor(d.data).permute(0, 3, 1, 2)/255-m)/s).to(device), torch.tensor(d.targets).to(device)) for d in sets]

def augment(x, gen):
    "Shift each image by up to four pixels, and mirror half of them"
    n,at = len(x),torch.arange(32, device=x.device)
    dy,dx = (torch.randint(9, (n, 1), generator=gen).to(x.device) for _ in 'yx')
    cols = torch.where((torch.rand(n, 1, generator=gen)<.5).to(x.device), 31-at, at)+dx
    i = torch.arange(n, device=x.device)[:,None,None]
    return F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)[i, (at+dy)[:,:,None], cols[:,None]].permute(0, 3, 1, 2)

def method_of(name, seed, steps):
    "The method, at its published interval; a shorter run has shorter ones"
    share = steps/total
    every = {} if name in ('static', 'RigL_avg') else dict(update_every=max(1, round(100*share)))
    return dict(static=Static, SET=SET, RigL=RigL, GMP=GMP, RigL_avg=RigL_avg)[name](seed=seed, **every, **(dict(stop_pct=last_update/total) if name in ('SET', 'RigL') else {}))

def train(name, sparsity, seed, dsets, steps, device):
    "One run from start to end; returns its record"
    (x,y),(xt,yt) = dsets
    torch.manual_seed(seed)
    model,start = wide_resnet(),time.time()
    method = None if name=='dense' else method_of(name, seed, steps)
    if method: sparsify_model(model, sparsity, **{'sparse_f': erdos_renyi_sparsity, **method.sparsify_kwargs(sparsity)})
    model = model.to(device, memory_format=torch.channels_last)
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=.9, nesterov=True, weight_decay=5e-4)
    gen,step = torch.Generator().manual_seed(seed),0
    while step<steps:
        for i in torch.randperm(len(x), generator=gen)[:len(x)//batch*batch].view(-1, batch)[:steps-step].to(device):
            step += 1
            for g in opt.param_groups: g['lr'] = lr*5.**-(int(step*total/steps)//drop_every)
            F.cross_entropy(model(augment(x[i], gen)), y[i]).backward()
            if method: method.step(model, opt, step, total=steps)
            else: opt.step()
            opt.zero_grad()
    model.eval()
    with torch.no_grad(): acc = (torch.cat([model(b) for b in xt.split(1000)]).argmax(1)==yt).float().mean().item()
    active = sum(int(m.sum()) for _,m,_ in sparse_params(model))
    return dict(name=f'{name} {sparsity:g} {seed}', method=name, sparsity=sparsity, seed=seed, steps=steps, accuracy=round(acc, 4), active=active,
                seconds=round(time.time()-start), device=str(device), **hardware())

done = records.done

def plan(): return [(n, s, seed) for seed in seeds for n,ss in [('dense', (0.,)), *((m, sparsities) for m in methods)] for s in ss]

def table():
    "Accuracy in percent: ours, published, reproduced by others; as Markdown"
    def cell(name, s):
        ours = spread([100*r['accuracy'] for r in done().values() if (r['method'], r['sparsity'])==(name, s)])
        return ' | '.join([ours, *(str(d.get(name, {}).get(s, '')) for d in (published, reproduced))])
    rows = ['| method | sparsity | ours (seeds) | published | reproduction report |', '|---|---:|---:|---:|---:|']
    return '\n'.join([*rows, *(f'| {n} | {s:.0%} | {cell(n, s)} |' for n,ss in [('dense', (0.,)), *((m, sparsities) for m in methods)] for s in ss)])

if __name__=='__main__':
    ap = parser(__doc__)
    ap.add_argument('folder', nargs='?', help='that of torchvision.datasets.CIFAR10')
    ap.add_argument('--random', action='store_true', help='random images; nothing is kept')
    ap.add_argument('--steps', type=int, default=total, help='optimizer steps; learning rates and updates are scaled')
    ap.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = ap.parse_args()
    if not (args.folder or args.random or args.table): ap.error('FOLDER or --random is required')
    dsets = None if args.table else data(args.folder, args.device)
    for r in [] if args.table else records.lacking(plan(), '{} {:g} {}'.format, args.only):
        row = train(*r, dsets, args.steps, args.device)
        print(row['name'], row['accuracy'], row['active'], f"{row['seconds']} s", flush=True)
        if args.folder and args.steps==total: records.add(row)
    print(table())
