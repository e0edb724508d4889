"What each of two processes runs: `python ranks_worker.py CASE RANK FOLDER`; results go to files"
import contextlib, random, sys, warnings
warnings.filterwarnings('ignore')
import torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from sparsefast.all import *
from helpers import *

WORLD = 2
def data(n, bs, dtype=torch.float32, seed=1):
    gen = torch.Generator().manual_seed(seed)
    return [(torch.randn(bs, 8, generator=gen, dtype=torch.float64).to(dtype), torch.randint(3, (bs,), generator=gen)) for _ in range(n)]

def half(t, rank): return t.chunk(WORLD)[rank]

def method_of(preset, **kw): return DSTMethod(**{**PRESETS[preset], 'batches_per_update': 4, 'replaces_step': preset=='RigL', **kw})

def train(model, m, rank=0, parts=1, total=24, accumulate=1, opt_f=None, dtype=torch.float32, look=noop, told=None):
    "One process of `parts`, or the whole on joined batches"
    opt = (opt_f or (lambda ps: torch.optim.SGD(ps, lr=.05, momentum=.9, weight_decay=1e-2)))(model.parameters())
    for step in range(1, total+1):
        micro = data(accumulate, 8, dtype, seed=step)
        for i,(x,y) in enumerate(micro):
            if parts>1: x,y = half(x, rank),half(y, rank)
            last = i==accumulate-1
            with contextlib.nullcontext() if last or not isinstance(model, DDP) else model.no_sync():
                (F.cross_entropy(model(x), y)/accumulate).backward()
        m.step(model if told is None else told(model.module), opt, step, (step-1)/total)
        opt.zero_grad()
        look(step)
    return opt

def net(seed=0, dtype=torch.float32, enforce=True):
    torch.manual_seed(seed)
    model = mlp(8, 24, 20, 3, dtype=dtype)
    sparsify_model(model, .6, enforce_mask=enforce)
    return model

def local_score(p, **kwargs): return torch.rand(p.shape, generator=torch.Generator().manual_seed(dist.get_rank()+1))
local_score.needs_grad = False

def plain(rank, preset, seeds=(0, 0), accumulate=1, dtype=torch.float32, opt_f=None, told=None, **kw):
    model = net(seeds[rank], dtype)
    ddp,log = DDP(sync_masks(model)),[]
    opt = train(ddp, method_of(preset, **kw), rank, WORLD, accumulate=accumulate, dtype=dtype, opt_f=opt_f, told=told, look=lambda s: log.append([m.clone() for m in masks(model)]))
    assert masked_are_zero(model) and sum(nnz(model))==sum(int(m.sum()) for m in log[0]) and not all(torch.equal(a, b) for a,b in zip(log[0], log[-1]))
    return dict(state=snapshot(model, opt), log=log)

def messages(rank):
    "How many collectives there are beside the averaging of gradients"
    seen,real = [],dist.broadcast
    model = net()
    sync_masks(model)
    ddp = DDP(model)
    dist.broadcast = lambda t, *args, **kw: (seen.append(t.numel()), real(t, *args, **kw))[1]
    train(ddp, method_of('RigL'), rank, WORLD)
    dist.broadcast = real
    left = [n for n,b in model.named_buffers() if any(b is x for x in ddp.modules_buffers)]
    return dict(seen=seen, rebroadcast=left)

def late(rank):
    "One rank begins to make its model when the other waits for it already, with other masks"
    store = dist.distributed_c10d._get_default_store()
    if rank: store.wait(['waiting'])
    else: net(0); store.set('waiting', '1')
    return plain(rank, 'SET', seeds=(0, 5))

def other_layers(rank):
    torch.manual_seed(0)
    model = mlp(8, 24, 20, 3)
    sparsify_model(model, .6, exclude=0 if rank else [])
    try: sync_masks(model)
    except ValueError as e: return dict(error=str(e))

def doctor(rank):
    "Masks that differ from the start, before and after they are made the same"
    from sparsefast.see.doctor import sparse_doctor
    model = net(seed=rank)
    before = [list(f) for f in sparse_doctor(model)]
    return dict(before=before, after=[list(f) for f in sparse_doctor(sync_masks(model))])

def whole(dtype=torch.float64, accumulate=1):
    "One process, on the joined batches"
    model,log = net(0, dtype),[]
    train(model, method_of('RigL'), accumulate=accumulate, dtype=dtype, look=lambda s: log.append([m.clone() for m in masks(model)]))
    return log

def zero(rank):
    "Each rank steps a part of the parameters and has their state: the run of an optimizer that is whole on both; and what is refused"
    from torch.distributed.optim import ZeroRedundancyOptimizer as Zero
    def run(opt_f, preset='RigL', attached=False):
        model = net()
        ddp,opt = DDP(sync_masks(model)),opt_f(model.parameters())
        if attached: attach(method_of(preset), ddp, opt, 24)
        for step in range(1, 25):
            (x,y), = data(1, 8, seed=step)
            f = lambda: (opt.zero_grad(), F.cross_entropy(ddp(half(x, rank)), half(y, rank)))[1].backward()
            if attached: opt.step(f)
            else: f(); method_of(preset).step(ddp, opt, step, total=24)
        return model,opt
    adam,own,out = partial(torch.optim.Adam, lr=1e-2),0,{}
    for preset in ('RigL', 'SET'):
        whole,o = run(adam, preset)
        for attached in (False, True):
            part,z = run(lambda ps: Zero(ps, torch.optim.Adam, lr=1e-2), preset, attached)
            assert not changed(snapshot(whole), snapshot(part)) and masked_are_zero(part)
            for (k,p),q in zip(part.named_parameters(), whole.parameters()):
                own += bool(s := z.optim.state.get(p))
                assert all(torch.equal(t, o.state[q][n]) for n,t in (s or {}).items())
    for what,f in dict(momentum=lambda: run(lambda ps: Zero(ps, torch.optim.Adam, lr=1e-2), 'SNFS'), overlap=lambda: run(lambda ps: Zero(ps, torch.optim.Adam, overlap_with_ddp=True, lr=1e-2)),
                       convert=lambda: to_sparse_layers(part, z, least=0.)).items():
        try: f(); out[what] = 'nothing was said'
        except ValueError as e: out[what] = str(e)
    return dict(own=own, **out)

def fsdp(rank):
    "FullyShardedDataParallel, with its own parameters and with the model's, around the model and around each layer: what is said"
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    said,((x,y),) = {},data(1, 8)
    def note(name, f):
        try: said[name] = f() or 'nothing'
        except ValueError as e: said[name] = str(e)
    for kw in (dict(use_orig_params=o, auto_wrap_policy=policy, device_id=torch.device('cpu')) for o in (False, True) for policy in (None, ModuleWrapPolicy({nn.Linear}))):
        def made(model, **more):
            model = FSDP(model, **kw, **more)
            return model,torch.optim.SGD(model.parameters(), lr=.1)
        def stepped(model, step=1, **more):
            model,opt = made(model, **more)
            F.cross_entropy(model(x), y).backward()
            method_of('RigL').step(model, opt, step, total=24)
        def seen(*args): raise AssertionError('computed')
        def watched(train):
            model = net()
            for m in model: m.register_forward_hook(seen)
            made(model)[0].train(train)(x)
        def partly():
            model = mlp(8, 24, 20, 3)
            sparsify_model(model, .6, exclude=[model[0]])
            stepped(model, 20, ignored_modules=[model[2], model[4]])
            assert masked_are_zero(model)
        name = f'{kw["use_orig_params"]} {kw["auto_wrap_policy"] is not None} '
        for train in (True, False): note(f'{name}forward {train}', lambda: watched(train))
        for step in (1, 20): note(f'{name}step {step}', lambda: stepped(net(enforce=False), step))
        note(f'{name}check', lambda: method_of('RigL').check(*made(net()), 24))
        note(f'{name}attach', lambda: attach(method_of('RigL'), *made(net()), 24) and None)
        note(f'{name}enforce', lambda: method_of('RigL').enforce(*made(net())))
        note(f'{name}sparsify', lambda: sparsify_model(made(mlp(8, 24, 20, 3))[0], .6) and None)
        note(f'{name}sparsify inner', lambda: sparsify_model(made(mlp(8, 24, 20, 3))[0].module, .6) and None)
        note(f'{name}doctor', lambda: '; '.join(f.message for f in sparse_doctor(made(net())[0])))
        note(f'{name}unsharded', partly)
    return said

def in_fastai(rank, folder):
    "distrib_ctx, with the one place patched where stock fastai needs CUDA"
    from fastai import distributed as fd
    from fastai.callback.core import Callback
    fd.DistributedDL._broadcast = lambda self, t, rank: (dist.broadcast(t := torch.LongTensor(t), rank), t.tolist())[1]
    torch.manual_seed(rank)                                                                   # other weights and masks on each rank, until DDP and the callback put it right
    random.seed(0)
    model = mlp(8, 24, 20, 3)
    learn = learner(model, n_iter=8, tmp=folder).sparsify(.6)
    learn.model.to('cpu')
    log = []
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        learn.fit(4, cbs=[DynamicSparseTrainingCallback(**{**RigL_presets, 'batches_per_update': 4, 'replaces_step': False}), Watch('after_step', lambda l: log.append([m.clone() for m in masks(model)]))])
        wrapped = not isinstance(learn.model, DDP)
    assert masked_are_zero(model) and wrapped
    return dict(state=snapshot(model), log=log)

adamw = lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=.1)
CASES = {f'{p}{"" if a==1 else "_accumulated"}': (lambda r, p=p, a=a: plain(r, p, accumulate=a)) for p in PRESETS for a in (1, 2)}
CASES |= dict(doctor=doctor, zero=zero, fsdp=fsdp, seeds=lambda r: plain(r, 'RigL', seeds=(0, 5)), late=late, adamw=lambda r: plain(r, 'SNFS', opt_f=adamw), float64=lambda r: plain(r, 'RigL', dtype=torch.float64),
              float64_accumulated=lambda r: plain(r, 'RigL', dtype=torch.float64, accumulate=2), messages=messages, other_layers=other_layers, local=lambda r: plain(r, 'SET', keep_score_f=local_score, grow_score_f=local_score),
              unwrapped=lambda r: plain(r, 'SET', keep_score_f=local_score, grow_score_f=local_score, told=lambda model: model), listed=lambda r: plain(r, 'SET', keep_score_f=local_score, grow_score_f=local_score, told=lambda model: [model[0], model[2], model[4]]),
              averaged=lambda r: plain(r, 'RigL', grad_steps=3, replaces_step=False))

if __name__=='__main__':
    folder,rank = sys.argv[1],int(__import__('os').environ['RANK'])
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    for name in sys.argv[2:]: torch.save(in_fastai(rank, folder) if name=='fastai' else CASES[name](rank), f'{folder}/{name}_{rank}')
    dist.barrier()
    dist.destroy_process_group()
