"What each process of a sharded training runs: `python sharded_worker.py FOLDER PROCESSES RANK`; results go to files"
import os, sys, warnings                                                       # nothing of fastai: each process would import it
warnings.filterwarnings('ignore')
from functools import partial
import torch, torch.distributed as dist
from torch import nn
from sparsefast.allocation import global_share
from sparsefast.attach import attach
from sparsefast.optim import opt_state
from sparsefast.patterns import fan_in_pattern, nm_pattern
from sparsefast.pieces import is_cut_up, piece, whole
from sparsefast.presets import *
from sparsefast.scores import gradient_magnitude, magnitude_no_empty_rows, not_returning, random_value, sampled, weight_magnitude
from sparsefast.sparsify import sparse_kaiming_normal_, sparsify_model
from sparsefast.topk import top_k_mask

def noop(*args): pass

def mlp(*sizes, bias=True):
    layers = [[nn.Linear(i, o, dtype=torch.float64, bias=bias), nn.ReLU()] for i,o in zip(sizes, sizes[1:])]
    return nn.Sequential(*sum(layers, [])[:-1])

adam = partial(torch.optim.Adam, lr=1e-2)
sgd = partial(torch.optim.SGD, lr=.05, momentum=.9, weight_decay=1e-2)
nm = partial(nm_pattern, n=2, m=4)
few,sizes,four = (8,7,1),(8,7,4,1),(8,20,4,1)                                             # rows that do not go into two or three, and fewer than there are processes
THREE_LONG,LONG = ('RigL','RigL_avg'),('RigL','RigL_avg','SET','GMP','static')       # 200 steps, on three processes or on two; what else there is has forty, on two
RUNS = dict(
    SET       = dict(method=lambda: SET(update_every=7), sizes=few),
    RigL      = dict(method=lambda: RigL(update_every=7), sizes=few, opt_f=adam),
    GMP       = dict(method=lambda: GMP(update_every=10), sizes=few, start=0.),
    RigL_avg  = dict(method=lambda: RigL_avg(update_every=8), sizes=few),
    static    = dict(method=lambda: Static(), sizes=few),
    adam      = dict(method=lambda: RigL(update_every=7), opt_f=adam),
    random    = dict(method=lambda: SET(update_every=7)),
    averaged  = dict(method=lambda: RigL_avg(update_every=8)),
    averaged_sgd = dict(method=lambda: RigL_avg(update_every=8), opt_f=partial(torch.optim.SGD, lr=.05)),
    sampled   = dict(method=lambda: RigL(update_every=7, keep_score_f=sampled(magnitude_no_empty_rows), grow_score_f=not_returning(sampled(gradient_magnitude))), opt_f=adam),
    global_   = dict(method=lambda: GMP(update_every=5, prune_share_f=global_share), start=0.),
    SNFS      = dict(method=lambda: SNFS(update_every=7), opt_f=partial(adam, amsgrad=True)),
    DSR       = dict(method=lambda: DSR(update_every=9, initial_drop_grow_pct=.3)),
    MEST_soft = dict(method=lambda: MEST_soft(update_every=9), start=.4),
    SRigL     = dict(method=lambda: SRigL(update_every=7), pattern=fan_in_pattern),
    nm        = dict(method=lambda: RigL(update_every=7, pattern_f=nm), pattern=nm, sizes=four),
    values    = dict(method=lambda: SET(update_every=7, grow_value_f=random_value), opt_f=adam),
)
def method_of(name): return RUNS[name]['method']()
SAVED = ('adam','averaged','averaged_sgd','DSR')

def net(name):
    run = RUNS[name]
    torch.manual_seed(0)
    model = mlp(*run.get('sizes', sizes), bias='sizes' not in run)
    kw = {k: run[j] for j,k in (('start', 'initial_sparsity'), ('pattern', 'pattern_f')) if j in run}
    sparsify_model(model, .5, **kw)
    return model

def shard(model, each=True, exact=True, **kw):
    "`each` layer by itself but for the last, which the model itself gathers; or all as one"
    from torch.distributed.fsdp import fully_shard
    for m in list(model)[:-1] if each else ():
        if isinstance(m, nn.Linear): fully_shard(m, **kw)
    model = fully_shard(model, **kw)
    for m in model.modules() if exact else ():                                  # one process has the loss and the others nothing, so that the sum is exact
        if hasattr(m, 'set_gradient_divide_factor'): m.set_gradient_divide_factor(1.)
    return model

def batch(step):
    gen = torch.Generator().manual_seed(step)
    return torch.randn(16, 8, generator=gen, dtype=torch.float64), torch.randn(16, 1, generator=gen, dtype=torch.float64)

def backward(model, step, part=1.):
    x,y = batch(step)
    ((model(x)-y).square().mean()*part).backward()

def train(name, model, opt, steps, total, part=1., attached=False, look=noop):
    method = method_of(name)
    if attached: attach(method, model, opt, total, steps[0]-1)
    for step in steps:
        opt.zero_grad()
        backward(model, step, part)
        if attached: opt.step()
        else: method.step(model, opt, step, total=total)
        look(step)

def opt_of(name, model): return RUNS[name].get('opt_f', sgd)(model.parameters())

def state_of(model, opt):
    "Everything, whole: weights, masks, targets, what methods and the optimizer remember"
    state = {k: whole(v).detach().clone() for k,v in model.state_dict().items()}
    for n,p in model.named_parameters():
        state |= {f'opt.{n}.{k}': whole(v).clone() for k,v in opt_state(opt, p).items() if torch.is_tensor(v)}
    return state

def masks_of(model): return [whole(b).clone() for n,b in model.named_buffers() if n.endswith('_mask')]

def reference(name, total):
    model,log = net(name),[]
    opt = opt_of(name, model)
    train(name, model, opt, range(1, total+1), total, look=lambda step: log.append(masks_of(model)) if step%10==0 else None)
    return dict(state=state_of(model, opt), log=log)

def masked(model):
    "True if this process's pieces of weights are zero where its pieces of masks say so"
    ps = dict(model.named_parameters())
    pairs = [(ps[n.removesuffix('_mask')], b) for n,b in model.named_buffers() if n.endswith('_mask')]
    return all((piece(p)[~(piece(b) if is_cut_up(p) else whole(b))]==0).all() for p,b in pairs)         # or gathered, after an evaluation

def made(name, **kw):
    model = shard(net(name), **kw)
    return model, opt_of(name, model)

def part(): return float(dist.get_rank()==0)

def equal(name, total=40, attached=False, **kw):
    (model,opt),log,ok = made(name, **kw),[],[]
    def look(step):
        ok.append(masked(model))
        if step%10==0: log.append(masks_of(model))
    train(name, model, opt, range(1, total+1), total, part(), attached, look)
    return dict(state=state_of(model, opt), log=log, masked=all(ok), own=[tuple(piece(p).shape) for p in model.parameters()])

# ------------------------------------------------------------ checkpoints
def save(name, folder, until=93, total=136):
    "The first steps, and a checkpoint in pieces, between two updates"
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    model,opt = made(name)
    train(name, model, opt, range(1, until+1), total, part())
    weights,state = get_state_dict(model, opt)
    dcp.save(dict(model=weights, opt=state), checkpoint_id=f'{folder}/checkpoint_{name}')
    return dict(state=state_of(model, opt))

def resume(name, folder, since=94, total=136):
    "The rest, on another number of processes, from a model with other masks"
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    torch.manual_seed(9)
    model = mlp(*sizes)
    sparsify_model(model, .5)
    model = shard(model)
    opt = opt_of(name, model)
    method_of(name).enforce(model, opt)
    weights,state = get_state_dict(model, opt)
    state = dict(model=weights, opt=state)
    dcp.load(state, checkpoint_id=f'{folder}/checkpoint_{name}')
    set_state_dict(model, opt, model_state_dict=state['model'], optim_state_dict=state['opt'])
    train(name, model, opt, range(since, total+1), total, part(), attached=name=='adam')
    return dict(state=state_of(model, opt), masked=masked(model))

# ------------------------------------------------------------ selection
def counted():
    "The highest scores, cut up: those of the whole, with ties, NaN, infinity and both zeros, and processes without a row"
    from torch.distributed.tensor import Shard, distribute_tensor
    mesh,gen = dist.init_device_mesh('cpu', (dist.get_world_size(),)),torch.Generator().manual_seed(0)
    def cut(t): return distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None)
    out = {}
    for shape in ((1, 9), (7, 5), (20, 3, 2)):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool):
            t = torch.randn(shape, generator=gen).mul(3).round().to(dtype)
            if dtype.is_floating_point: t.view(-1)[:6] = torch.tensor([0., -0., torch.nan, -torch.inf, torch.inf, 1e-30])
            mask = torch.rand(shape, generator=gen)<.6
            n = int(mask.sum())
            a = [top_k_mask(t, k, among=mask) for k in (0, n//3, n-1)] + [top_k_mask(t, k, kept=mask) for k in (1, t.numel()-n)] + [top_k_mask(t, n)]
            b = [top_k_mask(cut(t), k, among=cut(mask)) for k in (0, n//3, n-1)] + [top_k_mask(cut(t), k, kept=cut(mask)) for k in (1, t.numel()-n)] + [top_k_mask(cut(t), n)]
            out[f'{shape} {dtype}'] = all(x.equal(whole(y)) for x,y in zip(a, b))
    return out

def gathered(name):
    "Largest tensor that two updates gather"
    from torch.distributed.tensor import DTensor
    (model,opt),gather,most = made(name),DTensor.full_tensor,[0]
    def full_tensor(self, **kwargs):
        most.append(self.numel())
        return gather(self, **kwargs)
    DTensor.full_tensor = full_tensor
    try: train(name, model, opt, range(1, 19), 40, part())
    finally: DTensor.full_tensor = gather
    return max(most)

# ------------------------------------------------------------ the meta device
def meta():
    "A model that is made without memory: masks come after it has some; those from before are refused, and change nothing"
    from sparsefast.sparsify import unsparsify_model
    def make(before=None):
        with torch.device('meta'): model = mlp(*sizes)
        if before=='whole': sparsify_model(model, .5)
        shard(model)
        if before=='cut up': sparsify_model(model, .5)
        model.to_empty(device='cpu')
        for m in model.modules():
            if hasattr(m, 'reset_parameters'): m.reset_parameters()
        for n,b in model.named_buffers(): piece(b).zero_()                       # whatever memory has
        torch.manual_seed(0)
        return model, [whole(p).clone() for p in model.parameters()]
    model,_ = make()
    sparsify_model(model, .5)
    opt = adam(model.parameters())
    train('adam', model, opt, range(1, 16), 40, part())
    out = dict(trained=masked(model) and [int(m.sum()) for m in masks_of(model)]==[28, 14, 2])
    for before in ('whole', 'cut up'):
        model,start = make(before)
        out[before] = said(lambda: attach(RigL(update_every=4), model, adam(model.parameters()), 40)),said(lambda: model(batch(1)[0]))
        unsparsify_model(model)
        out[f'{before} since'] = all(a.equal(whole(p)) for a,p in zip(start, model.parameters()))         # the error has left some gathered
    return out

# ------------------------------------------------------------ what else there is
def said(f):
    try: return str(f() or 'nothing')
    except ValueError as e: return str(e)

def late():
    "Masks made after the model is cut up, at random and by magnitude, and two updates: those of a whole model"
    from sparsefast.see.analysis import sparse_summary
    out = {}
    for what,kw in dict(random={}, erk=dict(sparse_f='erk'), magnitude=dict(keep='magnitude'), pattern=dict(score_f=weight_magnitude, pattern_f=nm), init=dict(init_f=sparse_kaiming_normal_)).items():
        def make(cut):
            torch.manual_seed(3)
            model = mlp(*four)
            if cut: shard(model)
            sparsify_model(model, .5, exclude=[-1] if what=='pattern' else [], **kw)
            opt = sgd(model.parameters())
            train('SET', model, opt, range(1, 16), 40, part() if cut else 1.)
            return state_of(model, opt), repr(sparse_summary(model)), masked(model)
        (a,table,ok),(b,other,_) = make(True),make(False)
        out[what] = ok and table==other and a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    return out

def placements():
    "Hybrid sharding, columns, tensor parallelism, and what is refused"
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    mesh = lambda *shape: dist.init_device_mesh('cpu', shape, mesh_dim_names=('a', 'b')[:len(shape)])
    ref,out = reference('random', 40)['state'],{}
    same = lambda model, opt: all(torch.equal(v, ref[k]) for k,v in state_of(model, opt).items())
    for name,kw in dict(hybrid=dict(mesh=mesh(2, 1)), hybrid_cut=dict(mesh=mesh(1, 2)), columns=dict(shard_placement_fn=lambda p: Shard(1) if tuple(p.shape)==(7,8) else None)).items():
        model,opt = made('random', **kw)
        train('random', model, opt, range(1, 41), 40, part())
        out[name] = same(model, opt) and masked(model)
    model = net('nm')
    parallelize_module(model, mesh(2), {'0': ColwiseParallel(), '2': RowwiseParallel()})
    opt = sgd(model.parameters())
    kinds = [str(m.weight.placements[0]) for m in (model[0], model[2])]
    start = masks_of(model)
    train('nm', model, opt, range(1, 41), 40)
    out['tensor'] = masked(model) and [int(m.sum()) for m in masks_of(model)]==[int(m.sum()) for m in start] and not all(map(torch.equal, masks_of(model), start))
    out['kinds'] = kinds
    both = mesh(1, 2)
    model = net('nm')
    parallelize_module(model, both['b'], {'0': ColwiseParallel()})
    fully_shard(model, mesh=both['a'])
    out['strided'] = said(lambda: RigL(update_every=4).check(model, sgd(model.parameters()), 40))
    return out

def orders():
    "A dense state loaded between, evaluation, half precision, what is lost, and sentences"
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from sparsefast.see.analysis import sparse_summary
    from sparsefast.ship.deploy import to_fastest
    from sparsefast.ship.export import bake
    from sparsefast.ship.files import save_sparse
    from sparsefast.ship.shrink import shrink_model
    from sparsefast.sparsify import load_sparse_state, unsparsify_model
    from sparsefast.storage import to_sparse_layers
    out,x = {},batch(1)[0]
    model,opt = made('adam')
    def dirty():
        with torch.no_grad():
            for p in model.parameters(): piece(p).add_(.1)
    def right(y):
        "The output is that of a whole model with the masked weights"
        whole_ = mlp(*sizes)
        whole_.load_state_dict({k: whole(v) for k,v in model.state_dict().items() if k.endswith(('weight', 'bias'))})
        for m in whole_:
            n = f'{list(whole_).index(m)}.weight_mask'
            if isinstance(m, nn.Linear): m.weight.data *= whole(dict(model.named_buffers())[n])
        return torch.equal(whole_(x), y)
    with torch.no_grad(): model(x)                                              # the last layer stays gathered after it
    out['attach_after_evaluation'] = said(lambda: attach(RigL(update_every=4), model, opt, 40).remove())
    train('adam', model, opt, range(1, 4), 40, part())
    for mode in (True, False):
        dirty()
        model.train(mode)
        y = model(x)
        if mode: y.square().mean().mul(0).backward()
        out[f'masked_before_forward_{mode}'] = masked(model) and right(y.detach())
    model.train()
    table = repr(sparse_summary(model))
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    first,plain = full['0.weight'].clone(),mlp(*sizes)
    load_sparse_state(plain, full)
    out['summary'] = repr(sparse_summary(plain))==table
    for name,f in dict(save=lambda: save_sparse(model, 'x'), compress=lambda: to_sparse_layers(model), fastest=lambda: to_fastest(model, x), bake=lambda: bake(model), shrink=lambda: shrink_model(model, x)).items(): out[name] = said(f)
    set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True))
    out['loaded'] = masked(model)
    unsparsify_model(model)
    out['undone'] = not list(model.named_buffers()) and torch.equal(whole(model[0].weight), first)
    torch.manual_seed(dist.get_rank())
    model = mlp(*sizes)
    sparsify_model(model, .5)
    shard(model)
    out['seeds'] = said(lambda: SET(update_every=4).check(model, sgd(model.parameters()), 40))
    model = net('random')
    early = sgd(model.parameters())
    shard(model)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        SET(update_every=4).check(model, early, 40)
    out['early_optimizer'] = str(w[0].message)
    out['exploring'] = said(lambda: TopKAST(update_every=4).check(model, sgd(model.parameters()), 40))
    half = [net('adam').float() for _ in range(2)]
    shard(half[0], exact=False, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    opt = sgd(half[0].parameters())
    seen = []
    half[0][0].register_forward_hook(lambda m, args, y: seen.append(y.dtype))
    for step in range(1, 21):
        opt.zero_grad()
        half[0](batch(step)[0].float()).square().mean().backward()
        RigL(update_every=4).step(half[0], opt, step, total=20)
    out['half'] = masked(half[0]) and seen[0]==torch.bfloat16 and half[0][0].weight.dtype==torch.float32 and [int(m.sum()) for m in masks_of(half[0])]==[int(m.sum()) for m in masks_of(half[1])]
    model,opt = made('adam')
    backward(model, 1, part())
    if dist.get_rank()==0: piece(model[0].weight.grad)[0,0] = torch.nan
    start = masks_of(model)
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        RigL(update_every=4).step(model, opt, 4, total=40)
    out['nan'] = any('not finite' in str(i.message) for i in w) and all(map(torch.equal, start, masks_of(model)))
    return out

THREE = {name: partial(equal, name, total=200, each=False) for name in THREE_LONG} | {f'save_{n}': partial(save, n) for n in SAVED} | dict(counted=counted)
TWO = {name: partial(equal, name, **(dict(total=200, each=False) if name in LONG else {})) for name in RUNS if name not in (*THREE_LONG, 'adam')} | {f'resume_{n}': partial(resume, n) for n in SAVED}
TWO |= dict(attached=partial(equal, 'adam', attached=True), late=late, meta=meta, placements=placements, orders=orders, gathered=lambda: {n: gathered(n) for n in ('adam', 'random', 'GMP', 'sampled', 'SNFS', 'nm')})

if __name__=='__main__':
    folder,n,rank = sys.argv[1],*map(int, sys.argv[2:4])
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting_{n}', world_size=n, rank=rank)
    cases = TWO if n==2 else THREE
    for name in cases:
        kw = dict(folder=folder) if name.startswith(('save_', 'resume_')) else {}
        torch.save(cases[name](**kw), f'{folder}/{name}_{rank}')
    dist.barrier()
    dist.destroy_process_group()
