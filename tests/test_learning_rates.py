"Learning rates that rise after updates, and that follow density"
from functools import partial
import pytest, torch
import fastai.optimizer as fo
from torch import nn
from fastai.callback.schedule import *
from fastai.callback.fp16 import MixedPrecision
from helpers import *
from sparsefast.callback import DynamicSparseTrainingCallback
from sparsefast.layer import sparse_layers
from sparsefast.learning_rates import *
from sparsefast.methods import DSTMethod
from sparsefast.optim import group_settings
from sparsefast.presets import RigL, RigL_presets, SET_presets
from sparsefast.sparsify import sparsify_model
from sparsefast.storage import to_sparse_layers

def method(preset=RigL_presets, **kwargs): return DSTMethod(**{**preset, 'batches_per_update': 10, **kwargs})

def reference_factor(m, step, total, steps):
    "By counting on from the first step"
    since = None
    for s in range(1, step):
        since = 0 if s%10==0 and (s-1)/total<m.stop_pct and s!=total else since
        if since is not None: since += 1
    return 1. if since is None else min(1., since/steps)

@pytest.mark.parametrize('preset', [RigL_presets, SET_presets])
@pytest.mark.parametrize('steps', [1, 4, 10, 25])
def test_the_factor_counts_steps_since_an_update(steps, preset):
    m = method(preset)
    for step in range(1, 101):
        want = reference_factor(m, step, 100, steps)
        assert warmup_factor(m, step, total=100, steps=steps)==pytest.approx(want), step
        assert warmup_factor(m, step, pct=(step-1)/100, steps=steps)==pytest.approx(want) and warmup_lambda(m, 100, steps)(step-1)==pytest.approx(want)

def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match='steps must be 1 or more, got 0'): warmup_factor(method(), 3, total=10, steps=0)
    with pytest.raises(ValueError, match='share of training'): warmup_factor(method(batches_per_update=.1), 3, total=10)
    for density in (0, 1.5):
        with pytest.raises(ValueError, match=r'density must be in \(0,1\]'): density_groups(sparse_mlp(.5), .1, density=density)
    with pytest.raises(ValueError, match='must have a mask'): density_groups(mlp(4, 3), .1)

LR_OPTS = dict(torch=partial(torch.optim.AdamW, lr=.1), fastai=partial(fo.Adam, lr=.1), lookahead=lambda ps: fo.ranger(ps, lr=.1), wrapped=lambda ps: fo.OptimWrapper(ps, lr=.1, opt=torch.optim.SGD))
@pytest.mark.parametrize('opt', LR_OPTS)
def test_rates_are_put_back_whatever_happens(opt):
    o = LR_OPTS[opt](list(mlp(4, 3).parameters()))
    lrs = lambda: [g['lr'] for g in (o.param_groups if opt=='torch' else o.hypers)]
    with scaled_lr(o, .25): assert lrs()==pytest.approx([.025]*len(lrs()))
    with pytest.raises(KeyError), scaled_lr(o, .5): raise KeyError
    assert lrs()==[.1]*len(lrs())

def test_torchs_scheduler_and_the_block_take_the_same_steps():
    runs = []
    for by_scheduler in (True, False):
        model,m = sparse_mlp(.6),method()
        opt = torch.optim.SGD(model.parameters(), lr=.05)
        sched = torch.optim.lr_scheduler.LambdaLR(opt, warmup_lambda(m, 40, 5)) if by_scheduler else None
        for step,(x,y) in enumerate(batches(40), 1):
            backward(model, x, y)
            with scaled_lr(opt, 1. if by_scheduler else warmup_factor(m, step, total=40, steps=5)): m.step(model, opt, step, total=40)
            if sched: sched.step()
        runs.append(snapshot(model))
    assert not changed(*runs)

@pytest.mark.parametrize('opt', [fo.SGD, wrapped(partial(torch.optim.SGD, lr=.05))], ids=['fastai', 'wrapped'])
@pytest.mark.parametrize('preset', [RigL_presets, SET_presets], ids=['RigL', 'SET'])
def test_the_callback_trains_as_a_plain_loop_does(opt, preset):
    "With the two callbacks in any order; and the rate of the schedule is there again after each step"
    kw,seen = dict(batches_per_update=10),[]
    model = sparse_mlp(.6)
    o,m = torch.optim.SGD(model.parameters(), lr=.05),method(preset)
    for step,(x,y) in enumerate(batches(10)*4, 1):
        backward(model, x, y)
        with scaled_lr(o, warmup_factor(m, step, total=40, steps=5)): m.step(model, o, step, total=40)
    for first in (True, False):
        cbs = [DynamicSparseTrainingCallback(**{**preset, **kw}), UpdateWarmupCallback(5), Watch('after_batch', lambda l: seen.append(l.opt.hypers[0]['lr']))]
        learn = learner(opt_func=partial(opt, wd=0.) if opt is fo.SGD else opt, cbs=cbs if first else cbs[::-1])
        learn.fit(4, lr=.05)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a,b in zip(snapshot(learn.model).values(), snapshot(model).values()))
    assert seen==[.05]*80

def test_beside_a_schedule_and_lr_find():
    learn = learner(cbs=[DynamicSparseTrainingCallback(**{**RigL_presets, 'batches_per_update': 4}), UpdateWarmupCallback(3)])
    used = []
    learn.add_cb(Watch('before_step', lambda l: used.append(l.opt.hypers[0]['lr'])))
    with learn.no_bar(): learn.lr_find(num_it=10, show_plot=False)
    used.clear()
    learn.fit_one_cycle(2, .05)
    lrs,m = learn.recorder.lrs,RigL(update_every=4)
    steps = [s for s in range(1, 21) if not m.due(s, total=20)]                          # an update takes the step's place
    assert used==pytest.approx([lrs[s-1]*warmup_factor(m, s, total=20, steps=3) for s in steps])

def test_alone_it_is_refused():
    with pytest.raises(ValueError, match='must have a DynamicSparseTrainingCallback'): learner(cbs=UpdateWarmupCallback()).fit(1)

# ------------------------------------------------------------ by density
@pytest.mark.parametrize('compressed', [False, True])
@pytest.mark.parametrize('density,power', [(None, 1.), (1., 1.), (.3, .5), (1., 0.)])
def test_rates_by_density(density, power, compressed):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8, bias=False), nn.Linear(8, 2))
    sparsify_model(model, .7, sparse_f='erk', exclude=['3'])
    d = [l.nnz.item()/l.numel for l in sparse_layers(model)]
    whole = sum(l.nnz.item() for l in sparse_layers(model))/sum(l.numel for l in sparse_layers(model))
    if compressed: to_sparse_layers(model, least=0.)
    rest,*groups = density_groups(model, .01, density, power)
    assert [g['lr'] for g in groups]==pytest.approx([.01*((density or whole)/k)**power for k in d]) and rest['lr']==.01
    assert [g['params'][0] is l.p for g,l in zip(groups, sparse_layers(model), strict=True)]==[True]*len(d)
    every = [id(p) for g in (rest, *groups) for p in g['params']]
    assert sorted(every)==sorted(map(id, model.parameters()))
    opt = torch.optim.AdamW([rest, *groups])
    assert [g['lr'] for g in group_settings(opt)]==[g['lr'] for g in (rest, *groups)]

def test_groups_for_a_learner():
    model = sparse_mlp(.6)
    lrs = [g['lr'] for g in density_groups(model, .05)]
    learn = learner(model, splitter=density_splitter, cbs=DynamicSparseTrainingCallback(**{**RigL_presets, 'batches_per_update': 4}))
    learn.fit(1, lr=lrs)
    assert [h['lr'] for h in learn.opt.hypers]==pytest.approx(lrs) and masked_are_zero(model)
    assert [[id(p) for p in ps] for ps in learn.opt.param_lists]==[[id(p) for p in ps] for ps in density_splitter(model)]
