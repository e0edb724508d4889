"What each process of a sharded training runs: `python sharded_worker.py FOLDER CASE ...`; results go to files"
import os, sys, warnings
warnings.filterwarnings('ignore')
import torch, torch.distributed as dist
from torch import nn
from sparsefast.all import *
from sparsefast.optim import opt_state
from sparsefast.pieces import is_cut_up, piece, whole
from helpers import *

STEPS = 200
adam = partial(torch.optim.Adam, lr=1e-2, amsgrad=True)
sgd = partial(torch.optim.SGD, lr=.05, momentum=.9, weight_decay=1e-2)
nm = partial(nm_pattern, n=2, m=4)
sizes,four = (8,7,4,1),(8,20,4,1)                                             # rows that do not go into two or three, and fewer than there are processes
RUNS = dict(
    SET       = dict(method=lambda: SET(update_every=7)),
    RigL      = dict(method=lambda: RigL(update_every=7)),
    momentum  = dict(method=lambda: RigL(update_every=7), opt_f=sgd),
    GMP       = dict(method=lambda: GMP(update_every=10), start=0.),
    GMP_global= dict(method=lambda: GMP(update_every=10, prune_share_f=global_share), start=0.),
    RigL_avg  = dict(method=lambda: RigL_avg(update_every=8)),
    static    = dict(method=lambda: Static()),
    SNFS      = dict(method=lambda: SNFS(update_every=7)),
    DSR       = dict(method=lambda: DSR(update_every=9)),
    MEST_soft = dict(method=lambda: MEST_soft(update_every=9)),
    SRigL     = dict(method=lambda: SRigL(update_every=7), pattern=fan_in_pattern),
    nm        = dict(method=lambda: RigL(update_every=7, pattern_f=nm), pattern=nm, sizes=four),
    values    = dict(method=lambda: SET(update_every=7, grow_value_f=random_value)),
)
def method_of(name): return RUNS[name]['method']()

def net(name):
    run,d = RUNS[name],torch.float64
    torch.manual_seed(0)
    model = mlp(*run.get('sizes', sizes), dtype=d)
    kw = {k: run[j] for j,k in (('start', 'initial_sparsity'), ('pattern', 'pattern_f')) if j in run}
    sparsify_model(model, .5, **kw)
    return model

def shard(model, last=True, **kw):
    "Each layer by itself, but for the last, which the model itself gathers"
    from torch.distributed.fsdp import fully_shard
    for m in list(model)[:-1]:
        if isinstance(m, nn.Linear): fully_shard(m, **kw)
    return fully_shard(model, **kw)

def batch(step):
    gen = torch.Generator().manual_seed(step)
    return torch.randn(16, 8, generator=gen, dtype=torch.float64), torch.randn(16, 1, generator=gen, dtype=torch.float64)

def backward(model, step, part=1.):
    x,y = batch(step)
    ((model(x)-y).square().mean()*part).backward()

def train(name, model, opt, steps=range(1, STEPS+1), part=1., attached=False, look=noop, total=STEPS):
    method = method_of(name)
    if attached: attach(method, model, opt, total, steps[0]-1)
    for step in steps:
        opt.zero_grad()
        backward(model, step, part)
        if attached: opt.step()
        else: method.step(model, opt, step, total=total)
        look(step)

def opt_of(name, model): return RUNS[name].get('opt_f', adam)(model.parameters())

def state_of(model, opt):
    "Everything, whole: weights, masks, targets, what methods and the optimizer remember"
    state = {k: whole(v).detach().clone() for k,v in model.state_dict().items()}
    for n,p in model.named_parameters():
        state |= {f'opt.{n}.{k}': whole(v).clone() for k,v in opt_state(opt, p).items() if torch.is_tensor(v)}
    return state

def masks_of(model): return [whole(b).clone() for n,b in model.named_buffers() if n.endswith('_mask')]

def reference(name, steps=range(1, STEPS+1)):
    model,log = net(name),[]
    opt = opt_of(name, model)
    train(name, model, opt, steps, look=lambda step: log.append(masks_of(model)) if step%10==0 else None)
    return dict(state=state_of(model, opt), log=log)

def masked(model):
    "True if this process's pieces of weights are zero where its pieces of masks say so"
    ps = dict(model.named_parameters())
    return all((piece(ps[n.removesuffix('_mask')])[~piece(b)]==0).all() for n,b in model.named_buffers() if n.endswith('_mask'))

def made(name, **kw):
    model = shard(net(name), **kw)
    model.set_gradient_divide_factor(1.)                                        # one process has the loss and the others nothing, so that the sum is exact
    for m in model.modules():
        if hasattr(m, 'set_gradient_divide_factor'): m.set_gradient_divide_factor(1.)
    return model, opt_of(name, model)

def equal(name, attached=False):
    model,opt = made(name)
    log,ok = [],[]
    def look(step):
        ok.append(masked(model))
        if step%10==0: log.append(masks_of(model))
    train(name, model, opt, part=float(dist.get_rank()==0), attached=attached, look=look)
    own = [tuple(piece(p).shape) for p in model.parameters()]
    return dict(state=state_of(model, opt), log=log, masked=all(ok), own=own)

CASES = {name: partial(equal, name) for name in RUNS}
CASES['attached'] = partial(equal, 'RigL', attached=True)

if __name__=='__main__':
    folder,rank = sys.argv[1],int(os.environ['RANK'])
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    for name in sys.argv[2:]: torch.save(CASES[name](), f'{folder}/{name}_{rank}')
    dist.barrier()
    dist.destroy_process_group()
