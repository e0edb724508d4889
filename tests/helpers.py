"Small models, optimizers, data and comparisons that the tests share"
import tempfile
from functools import partial
import torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from fastcore.basics import noop
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from sparsefast.masks import masked_params
from sparsefast.presets import RigL_presets, SET_presets, SNFS_presets, Static_presets
from sparsefast.scores import inner_opt
from sparsefast.sparsify import sparsify_model

torch.set_num_threads(1)                                                              # rounding depends on it: also in processes that tests start

PRESETS = dict(SET=SET_presets, SNFS=SNFS_presets, RigL=RigL_presets)

def mlp(*sizes, dtype=None, bias=True):
    layers = [[nn.Linear(i, o, bias=bias, dtype=dtype), nn.ReLU()] for i,o in zip(sizes, sizes[1:])]
    return nn.Sequential(*sum(layers, [])[:-1])

def sparse_mlp(sparsity=0.6, sizes=(8,24,20,3), seed=0, **kwargs):
    torch.manual_seed(seed)
    model = mlp(*sizes, **kwargs)
    sparsify_model(model, sparsity)
    return model

def masks(model): return [mask.clone() for *_,mask in masked_params(model)]
def nnz(model): return [int(m.sum()) for m in masks(model)]
def n_params(model): return sum(p.numel() for _,_,p,_ in masked_params(model))
def same_masks(a, b): return len(a)==len(b) and all(torch.equal(i, j) for i,j in zip(a, b))
def masked_are_zero(model): return all((p[~mask]==0).all() for _,_,p,mask in masked_params(model))

def opt_tensors(opt, p): return {k: v for k,v in inner_opt(opt).state.get(p, {}).items() if torch.is_tensor(v) and v.shape==p.shape}

def snapshot(model, opt=None):
    "Everything there is to change, copied"
    snap = {f'model.{k}': v.clone() for k,v in model.state_dict().items()}
    if opt is not None:
        for n,p in model.named_parameters(): snap |= {f'opt.{n}.{k}': v.clone() for k,v in opt_tensors(opt, p).items()}
    return snap

def changed(a, b):
    "Names that differ between two snapshots, bit for bit"
    differs = lambda i, j: not torch.equal(i.nan_to_num(nan=12345.), j.nan_to_num(nan=12345.))
    return [k for k in a|b if k not in a or k not in b or differs(a[k], b[k])]

# ------------------------------------------------------------ a plain loop
def batches(n, bs=8, n_in=8, n_out=3, dtype=None, seed=1):
    g,device = torch.Generator().manual_seed(seed),torch.get_default_device()
    return [(torch.randn(bs, n_in, generator=g, device='cpu').to(device, dtype), torch.randint(n_out, (bs,), generator=g, device='cpu').to(device)) for _ in range(n)]

def backward(model, x, y):
    for p in model.parameters(): p.grad = None
    F.cross_entropy(model(x), y).backward()

def plain_loop(model, opt, method, total=40, every_step=noop, dtype=None):
    "`total` optimizer steps, dense ones without a method; `every_step(step)` runs after each, before any forward"
    for step,(x,y) in enumerate(batches(total, dtype=dtype), 1):
        backward(model, x, y)
        if method: method.step(model, opt, step, (step-1)/total)
        else: opt.step()
        every_step(step)

SGD,Adam = torch.optim.SGD,torch.optim.Adam
TORCH_OPTS = dict(
    sgd       = partial(SGD, lr=0.1),
    momentum  = partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-2),
    nesterov  = partial(SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    adam      = partial(Adam, lr=1e-2, amsgrad=True),
    adamw     = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    rmsprop   = partial(torch.optim.RMSprop, lr=1e-3, momentum=0.9, weight_decay=1e-2),
    adagrad   = partial(torch.optim.Adagrad, lr=1e-2))
HAS_MOMENTUM = {'momentum','nesterov','adam','adamw','rmsprop'}

# ------------------------------------------------------------ a learner
TMP = tempfile.TemporaryDirectory()                                                      # where lr_find keeps its copy
def tensor_dls(n_iter=10, bs=8, n_in=8, n_out=3, seed=1):
    x,y = map(torch.cat, zip(*batches(n_iter*bs//8, 8, n_in, n_out, seed=seed)))           # the same examples whatever the batch size
    train,valid = TensorDataset(x, y), TensorDataset(x[:2*bs], y[:2*bs])
    return DataLoaders(DataLoader(train, bs=bs, shuffle=False, num_workers=0), DataLoader(valid, bs=bs, num_workers=0), device=torch.get_default_device())

def learner(model=None, opt_func=None, cbs=None, n_iter=10, bs=8, tmp=None, **kwargs):
    "Quiet, with batches that are the same each epoch; ten of them, so that updates each eight steps see different ones"
    if opt_func is not None: kwargs['opt_func'] = opt_func
    learn = Learner(tensor_dls(n_iter, bs), sparse_mlp() if model is None else model, loss_func=nn.CrossEntropyLoss(), cbs=cbs, lr=0.05,
                    path=tmp or TMP.name, **kwargs)
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)

def wrapped(opt): return partial(OptimWrapper, opt=opt)

class Watch(Callback):
    "Calls `f(learn)` at an event; the last of all by default"
    run_valid = False
    def __init__(self, event, f, order=100):
        self.order = order
        setattr(self, event, lambda: f(self.learn))
